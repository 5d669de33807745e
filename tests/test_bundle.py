import hashlib
import json
import shutil

import pytest
import torch
from test_engine import WORDS, save_student, some_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from disranker import bundle, conversion
from disranker import student as students
from disranker.contract import Contract, Tokens
from disranker.engine import Engine
from disranker.lineage import Node
from disranker.recipe import Refused, Student

INTERVAL = {"value": 0.81234, "low": 0.79, "high": 0.83}
REPORT = {"queries": 300, "runs": {"bm25": {"mrr@10": {"value": 0.5}}, "student": {"ndcg@10": INTERVAL}}, "pairs": []}


MEASURED = {
    "torch": {"threads": [1, 2], "pairs_per_s": [70.0, 130.0], "ndcg@10": 0.8},
    "openvino-int8": {
        "threads": [1, 2],
        "pairs_per_s": [300.0, 1412.4],
        "ndcg@10": 0.799,
        "max_difference": 0.05,
        "kendall_tau": 0.99,
    },
}
NODE = {"manifest": "ab", "finished": "2026-01-01T00:00:00", "counts": {}, "files": [], "rests_on_forgotten": []}
CHAIN = {
    "bundle": Node(**NODE | {"fingerprint": "01", "reads": {"searches": "02"}}),
    "searches": Node(**NODE | {"fingerprint": "02", "reads": {}, "files": [["/logs/a.ndjson", 7, 1]]}),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def released(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "bundle"
    bundle.write(folder, student, name="shoes", report=REPORT, facts={"training queries": 1200})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle with all engines and pages, of a student as `distill` makes one, with scores that differ."""
    folder = tmp_path_factory.mktemp("whole") / "student"
    folder.mkdir()
    limits = Student(vocabulary=120, width=32, layers=1, heads=2, max_tokens=64)
    students.scratch(folder, [" ".join(WORDS)], limits.model_copy(update={"max_tokens": 128}), 0)
    model = BertForSequenceClassification.from_pretrained(folder)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(folder)
    tokens = Tokens.agree(folder, "encoder", limits)
    tokens.contract.save(folder)
    conversion.export(folder, folder, tokens.prompts(*some_pairs(30, seed=1)))
    for page in ("report.html", "report.json"):
        (folder / page).write_text(json.dumps(REPORT))
    target = folder.parent / "bundle"
    bundle.write(
        target,
        folder,
        name="shoes",
        report=REPORT,
        engine="openvino-int8",
        measured=MEASURED,
        gate={"passed": True, "bars": []},
        chain=CHAIN,
    )
    return target


@pytest.fixture
def copy(released, tmp_path):
    return shutil.copytree(released, tmp_path / "bundle")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(folder):
    with pytest.raises(Refused) as caught:
        bundle.verify(folder)
    return str(caught.value)


def test_a_bundle_scores_as_the_student_it_was_made_of(released, student):
    pairs = some_pairs(5)
    assert Engine.from_bundle(released).scores(*pairs) == Engine(student).scores(*pairs)


def test_the_manifest_has_the_sha256_of_6_files_the_contract_and_the_report(released, student):
    manifest = bundle.verify(released)
    assert manifest == json.loads((released / "bundle.json").read_text())
    assert manifest["files"] == {path.name: sha256(path) for path in released.iterdir() if path.name != "bundle.json"}
    assert len(manifest["files"]) == 6
    assert manifest["contract"] == Contract.model_validate_json((student / "contract.json").read_text()).digest
    assert (manifest["format"], manifest["name"], manifest["report"]) == (2, "shoes", REPORT)
    assert manifest["engine"] == "torch" and manifest["engines"] == {} and manifest["lineage"] == {}


def test_the_card_names_what_it_was_trained_on_and_every_metric(released):
    card = (released / "README.md").read_text()
    assert "# shoes" in card and "- training queries: 1200" in card and "On 300 queries." in card
    assert "| run | mrr@10 | ndcg@10 |" in card
    assert "| bm25 | 0.500 | not measured |" in card
    assert "| student | not measured | 0.812 (0.790 to 0.830) |" in card


def test_one_changed_byte_is_refused_with_both_digests(copy):
    weights = copy / "model.safetensors"
    before = sha256(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = refusal(copy)
    assert "model.safetensors" in message and f"expected {before}, found {sha256(weights)}" in message
    with pytest.raises(Refused, match=r"model\.safetensors"):
        Engine.from_bundle(copy)


@pytest.mark.parametrize("name", [*bundle.ENGINE_FILES, "report.html", "report.json", "README.md"])
def test_one_changed_byte_of_an_engine_or_a_page_is_refused(whole, tmp_path, name):
    other = shutil.copytree(whole, tmp_path / "bundle")
    content = bytearray((other / name).read_bytes())
    content[len(content) // 2] ^= 1
    (other / name).write_bytes(content)
    assert f"{name}: sha256 expected {sha256(whole / name)}, found {sha256(other / name)}" in refusal(other)
    with pytest.raises(Refused, match=name):
        Engine.from_bundle(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["engines"]["torch"].update(pairs_per_s=[1.0]),
        lambda told: told["gate"].update(passed=False),
        lambda told: told["lineage"]["searches"].update(fingerprint="other"),
        lambda told: told.update(created="2000-01-01T00:00:00+00:00"),
        lambda told: told.update(engine="torch"),
        lambda told: told.pop("digest"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(whole, tmp_path, change):
    other = shutil.copytree(whole, tmp_path / "bundle")
    told = json.loads((other / "bundle.json").read_text())
    change(told)
    (other / "bundle.json").write_text(json.dumps(told))
    assert "bundle.json: digest expected" in refusal(other)


def test_a_whole_bundle_has_13_files_and_the_manifest_says_why_its_engine_was_chosen(whole):
    manifest = bundle.verify(whole)
    assert set(manifest["files"]) == {*bundle.MODEL_FILES, *bundle.ENGINE_FILES, *bundle.REPORT_FILES, "README.md"}
    assert len(manifest["files"]) == 13
    assert manifest["engine"] == "openvino-int8" and manifest["engines"] == MEASURED
    assert manifest["gate"]["passed"] and manifest["lineage"]["searches"]["files"] == [["/logs/a.ndjson", 7, 1]]


def test_a_bundle_is_loaded_with_the_engine_that_it_chose_or_with_the_one_asked_for(whole):
    pairs = some_pairs(8)
    chosen, exact = Engine.from_bundle(whole).scores(*pairs), Engine.from_bundle(whole, engine="torch").scores(*pairs)
    assert chosen == Engine(whole, engine="openvino-int8").scores(*pairs) != exact
    assert exact == Engine(whole).scores(*pairs)


def test_a_bundle_without_an_engine_refuses_it_by_name(released):
    with pytest.raises(Refused, match=r"no engine openvino: no openvino_model\.xml, openvino_model\.bin"):
        Engine.from_bundle(released, engine="openvino")


def test_a_manifest_that_chooses_an_engine_whose_files_it_lacks_is_refused(copy):
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"engine": "openvino"}))
    assert "openvino_model.bin: sha256 expected none, found none" in refusal(copy)


@pytest.mark.parametrize(("engine", "file"), [("onnx", "model.onnx"), ("torch", "openvino_model.bin")])
def test_a_chosen_engine_or_half_an_engine_is_not_released(student, tmp_path, engine, file):
    half = shutil.copytree(student, tmp_path / "half")
    (half / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(Refused, match=f"it has no .*{file}"):
        bundle.write(tmp_path / "bundle", half, name="x", report={}, engine=engine)
    assert not (tmp_path / "bundle").exists()


def short_pairs():
    """Pairs of which no field is cut: 40 of 64 tokens are a query and a title at most."""
    words = [w for w in WORDS if len(w) < 6]
    draw = [[words[(place * step + 1) % len(words)] for place in range(1, 4)] for step in range(1, 9)]
    texts = [" ".join(row) for row in draw]
    return texts, texts[::-1], [*texts[4:], *texts[:4]]


def test_transformers_loads_a_bundle_as_it_is_and_gives_its_8_scores(whole):
    queries, titles, summaries = short_pairs()
    tokenizer, model = (kind.from_pretrained(whole) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    documents = [f"{title} {summary}" for title, summary in zip(titles, summaries, strict=True)]
    with torch.no_grad():
        given = model(**tokenizer(queries, documents, padding=True, return_tensors="pt")).logits[:, 0]
    scores = Engine(whole).scores(queries, titles, summaries)
    assert given.tolist() == pytest.approx(scores, abs=1e-4)
    assert max(scores) - min(scores) > 0.1


def test_cross_encoder_loads_a_bundle_as_it_is_and_gives_its_8_raw_logits(whole):
    from sentence_transformers import CrossEncoder

    queries, titles, summaries = short_pairs()
    documents = [f"{title} {summary}" for title, summary in zip(titles, summaries, strict=True)]
    given = CrossEncoder(str(whole), device="cpu").predict(list(zip(queries, documents, strict=True)))
    assert given.tolist() == pytest.approx(Engine(whole).scores(queries, titles, summaries), abs=1e-4)


def test_cross_encoder_cuts_a_long_summary_where_we_do(whole, tmp_path):
    from sentence_transformers import CrossEncoder

    long = " ".join(WORDS * 9)
    given = CrossEncoder(str(whole), device="cpu").predict([("red shoe", f"trail {long}")])
    assert given.tolist() == pytest.approx(Engine(whole).scores(["red shoe"], ["trail"], [long]), abs=1e-4)
    assert AutoTokenizer.from_pretrained(whole).model_max_length == 64


def test_the_card_of_a_whole_bundle_tells_speeds_nearness_and_files(whole):
    card = (whole / "README.md").read_text()
    assert "This bundle chooses `openvino-int8`." in card
    assert "| engine | pairs/s, 1 thread | pairs/s, 2 threads | NDCG@10 |" in card
    assert "| torch | 70 | 130 | 0.8000 |  |  |" in card
    assert "| openvino-int8 | 300 | 1,412 | 0.7990 | 5.0e-02 | 0.9900 |" in card
    assert "1 artefacts lead from 1 files" in card and "| searches | `02` | 2026-01-01T00:00:00 |" in card


def test_a_missing_file_is_refused_with_the_digest_it_had(copy):
    before = sha256(copy / "config.json")
    (copy / "config.json").unlink()
    assert f"config.json: sha256 expected {before}, found none" in refusal(copy)


def test_an_extra_file_is_refused_with_the_digest_it_has(copy):
    (copy / "notes.txt").write_text("hello")
    assert f"notes.txt: sha256 expected none, found {sha256(copy / 'notes.txt')}" in refusal(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pkl", "modeling.py", "op.so", "folder"])
def test_a_file_that_may_hold_code_is_refused_even_if_the_manifest_lists_it(copy, name):
    (copy / name).write_text("x")
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"][name] = sha256(copy / name)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    assert f"{name} may hold code" in refusal(copy)


def test_a_manifest_that_leaves_out_the_weights_is_refused_without_them(copy):
    (copy / "model.safetensors").unlink()
    manifest = json.loads((copy / "bundle.json").read_text())
    del manifest["files"]["model.safetensors"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    assert "model.safetensors: sha256 expected none, found none" in refusal(copy)


def test_a_manifest_with_another_contract_is_refused_with_both_digests(copy):
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"contract": "0123"}))
    assert f"contract.json has digest {manifest['contract']}, bundle.json says 0123" in refusal(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[]", "no manifest"),
        ('{"format": 1, "files": {}}', "format 1, this version reads 2; publish it again"),
        ('{"format": 3}', "format 3, this version reads 2"),
        ('{"format": 2}', "files: Field required"),
    ],
)
def test_a_broken_manifest_is_refused(copy, content, reason):
    (copy / "bundle.json").write_text(content)
    assert reason in refusal(copy)


def test_a_model_folder_is_no_bundle(student):
    assert "no bundle" in refusal(student)


def test_a_second_bundle_needs_a_folder_of_its_own(released, student):
    with pytest.raises(Refused, match="not empty"):
        bundle.write(released, student, name="again", report={})


def test_a_model_without_contract_is_not_released_and_nothing_is_written(student, tmp_path):
    bare = shutil.copytree(student, tmp_path / "bare")
    (bare / "contract.json").unlink()
    with pytest.raises(Refused, match=r"no contract\.json"):
        bundle.write(tmp_path / "bundle", bare, name="x", report={})
    assert not (tmp_path / "bundle").exists()


def test_only_an_encoder_is_released(student, tmp_path):
    decoder = shutil.copytree(student, tmp_path / "decoder")
    agreed = Contract.model_validate_json((decoder / "contract.json").read_text())
    agreed.model_copy(update={"form": "decoder"}).save(decoder)
    with pytest.raises(Refused, match="of a decoder"):
        bundle.write(tmp_path / "bundle", decoder, name="x", report={})
