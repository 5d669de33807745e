import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_engine import WORDS, save_student, some_pairs

from disranker import conversion, engines
from disranker.contract import Tokens
from disranker.engine import Engine
from disranker.recipe import Refused

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of one layer in all its forms, calibrated with 60 pairs."""
    folder = save_student(tmp_path_factory.mktemp("student"), num_hidden_layers=1)
    conversion.export(folder, folder, Tokens.load(folder).prompts(*some_pairs(60, seed=1)))
    return folder


@pytest.fixture(scope="module")
def exact(student):
    return Engine(student).scores(*some_pairs(40))


def test_8_bits_are_made_without_a_word_and_without_a_change_to_the_handlers_of_others(student, tmp_path, capsys):
    import nncf  # noqa: F401 - its logger exists from here on

    handler = logging.StreamHandler()
    logging.getLogger("nncf").addHandler(handler)
    try:
        conversion.export(student, tmp_path, Tokens.load(student).prompts(*some_pairs(8)))
    finally:
        logging.getLogger("nncf").removeHandler(handler)
    assert handler.level == logging.NOTSET and "INFO:nncf" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_40_scores_of_a_float_engine_equal_torchs_to_4_digits_in_the_order_given(student, exact, name):
    scores = Engine(student, engine=name).scores(*some_pairs(40))
    assert scores == pytest.approx(exact, abs=1e-4)
    assert len({round(score, 3) for score in scores}) > 30


def test_8_bits_score_otherwise_than_float_and_rank_40_pairs_nearly_alike(student, exact):
    scores = Engine(student, engine="openvino-int8").scores(*some_pairs(40))
    assert max(abs(np.subtract(scores, exact))) > 1e-3
    assert np.corrcoef(scores, exact)[0, 1] > 0.98


def test_bfloat16_scores_otherwise_than_float32_and_ranks_40_pairs_alike_or_says_that_the_cpu_cannot(student, exact):
    if reason := engines.unable("openvino-bf16"):
        with pytest.raises(Refused, match=f"the engine openvino-bf16 does not run here: {reason}"):
            Engine(student, engine="openvino-bf16")
        return
    scores = Engine(student, engine="openvino-bf16").scores(*some_pairs(40))
    assert max(abs(np.subtract(scores, exact))) > 1e-4
    assert np.corrcoef(scores, exact)[0, 1] > 0.99


def test_a_cpu_without_bfloat16_is_told_and_does_not_compute_in_float32_instead(student, monkeypatch):
    monkeypatch.setattr(engines.openvino().Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(Refused, match="openvino-bf16 does not run here: OpenVINO says that this CPU computes in FP32"):
        Engine(student, engine="openvino-bf16")
    assert engines.unable("openvino-int8") is None


HERE = [name for name in engines.NAMES if not engines.unable(name)]


@pytest.mark.parametrize("name", HERE)
def test_the_score_of_a_pair_does_not_depend_on_the_padding_of_its_batch(student, name):
    pairs = some_pairs(24)
    alone, together = (Engine(student, 1, budget, name).scores(*pairs) for budget in (1, 4096))
    assert alone == pytest.approx(together, abs=2e-4 if name != "openvino-bf16" else 0.02)


@pytest.mark.parametrize("name", HERE)
def test_no_pairs_have_no_scores_in_any_engine(student, name):
    assert Engine(student, engine=name).scores([], [], []) == []


def test_the_graph_is_valid_onnx_of_2_free_sizes(student):
    graph = onnx.load(student / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    sizes = {taken.name: [size.dim_param for size in taken.type.tensor_type.shape.dim] for taken in graph.graph.input}
    assert sizes == {key: ["rows", "tokens"] for key in ("input_ids", "attention_mask", "token_type_ids")}


def test_float_weights_of_openvino_keep_32_bits_and_8_bits_take_less_room(student):
    weights = sum(value.numel() for value in Engine(student)._forward.model.bert.state_dict().values())
    assert (student / "openvino_model.bin").stat().st_size > 0.9 * 4 * weights  # equal constants are stored once
    # Embeddings stay, matrices shrink; in so small a model that is little.
    assert (student / "openvino_int8.bin").stat().st_size < (student / "openvino_model.bin").stat().st_size


def test_openvino_is_told_to_compute_in_float32(student):
    model = Engine(student, engine="openvino")._forward._model
    assert str(model.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


@pytest.mark.parametrize(
    ("name", "count"), [("openvino", "INFERENCE_NUM_THREADS"), ("openvino-int8", "INFERENCE_NUM_THREADS")]
)
def test_one_thread_is_set_for_openvino(student, name, count):
    assert Engine(student, 1, engine=name)._forward._model.get_property(count) == 1


def test_one_thread_is_set_for_onnx_and_torch_keeps_its_own(student):
    before = torch.get_num_threads()
    engine = Engine(student, 1, engine="onnx")
    assert engine._forward._session.get_session_options().intra_op_num_threads == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("onnx", "model.onnx"),
        ("openvino", "openvino_model.xml"),
        ("openvino", "openvino_model.bin"),
        ("openvino-int8", "openvino_int8.bin"),
    ],
)
def test_an_engine_without_its_file_is_refused_and_not_replaced(student, tmp_path, name, file):
    for path in student.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(Refused, match=f"has no engine {name}: no {file}"):
        Engine(tmp_path, engine=name)


def test_an_unknown_engine_is_refused_with_those_that_there_are(student):
    with pytest.raises(
        Refused, match="no engine 'tensorrt'; there are torch, torch-gpu, onnx, openvino, openvino-bf16, openvino-"
    ):
        Engine(student, engine="tensorrt")


def test_without_prompts_there_are_3_engines(tmp_path):
    save_student(tmp_path, num_hidden_layers=1)
    conversion.export(tmp_path, tmp_path, None)
    assert (tmp_path / "openvino_model.xml").exists() and not list(tmp_path.glob("openvino_int8*"))


def test_8_bits_without_a_pair_to_calibrate_with_are_refused(student, tmp_path):
    with pytest.raises(Refused, match="there are none"):
        conversion.export(student, tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_student_of_one_segment_runs_in_all_engines(tmp_path):
    save_student(tmp_path, num_hidden_layers=1, type_vocab_size=1)
    conversion.export(tmp_path, tmp_path, None)
    pairs = some_pairs(5)
    scores = [Engine(tmp_path, engine=name).scores(*pairs) for name in ("torch", "onnx", "openvino")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4) and scores[2] == pytest.approx(scores[0], abs=1e-4)


def test_nothing_connects_and_nothing_that_reports_is_loaded_on_the_whole_way(student, tmp_path):
    """In a process of its own: NNCF does not report where it sees pytest."""
    program = (
        "import socket, sys\n"
        "sys.addaudithook(lambda event, _: event in ('socket.connect', 'socket.getaddrinfo') and sys.exit(event))\n"
        "from disranker import conversion\n"
        "from disranker.contract import Tokens\n"
        "from disranker.engine import Engine\n"
        f"student, target = {str(student)!r}, {str(tmp_path)!r}\n"
        f"prompts = Tokens.load(student).prompts(*[['{' '.join(WORDS)}'] * 2] * 3)\n"
        "conversion.export(student, target, prompts)\n"
        "Engine(student, engine='openvino-int8').logits(prompts)\n"
        "print(sorted(name for name in sys.modules if name.startswith('openvino_telemetry.')))\n"
    )
    (tmp_path / "home").mkdir()
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "HOME": str(tmp_path / "home"), "TQDM_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"
    assert not list((tmp_path / "home").rglob("*openvino*"))


@pytest.mark.parametrize("dtype, far", [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_torch_in_16_bits_scores_otherwise_than_in_32_and_ranks_alike(student, exact, dtype, far):
    """As on a GPU, but for the device."""
    tokens = Tokens.load(student)
    forward = engines.Torch(student, tokens.contract, None, "cpu", dtype)
    prompts = tokens.prompts(*some_pairs(40))
    scores = forward(engines.Rows.padded(prompts, tokens.contract.pad))
    assert 0 < max(abs(np.subtract(scores, exact))) < far
    assert np.corrcoef(scores, exact)[0, 1] > 0.99


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_runs_bfloat16_where_it_can(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert engines.half() is dtype


def test_on_a_gpu_40_pairs_rank_as_on_the_cpu_or_a_line_says_that_there_is_none(student, exact):
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="torch-gpu does not run here: torch sees no GPU"):
            Engine(student, engine="torch-gpu")
        return
    scores = Engine(student, engine="torch-gpu").scores(*some_pairs(40))
    assert np.corrcoef(scores, exact)[0, 1] > 0.99
