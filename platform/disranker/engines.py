"""The forms in which a student runs, and what each needs in its folder.

torch          model.safetensors                             float32, any device's numbers compare with it
torch-gpu      the same                                      bfloat16, or float16 on cards that lack it; NVIDIA
onnx           model.onnx                                    float32, ONNX Runtime
openvino       openvino_model.xml, openvino_model.bin        float32
openvino-bf16  the same                                      bfloat16, on CPUs that compute in it
openvino-int8  openvino_int8.xml, openvino_int8.bin          weights and activations in 8 bits

All but `torch-gpu` run on the CPU. A form whose files are absent, or that this machine cannot compute in, is refused,
never replaced by another.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import BertForSequenceClassification

from disranker.batches import Rows
from disranker.contract import Contract
from disranker.recipe import Refused

Name = Literal["torch", "torch-gpu", "onnx", "openvino", "openvino-bf16", "openvino-int8"]
Forward = Callable[[Rows], list[float]]  # a raw logit for each row

NAMES: tuple[Name, ...] = get_args(Name)
FILES: dict[Name, tuple[str, ...]] = {
    "torch": ("model.safetensors", "config.json"),
    "torch-gpu": ("model.safetensors", "config.json"),
    "onnx": ("model.onnx",),
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
    "openvino-bf16": ("openvino_model.xml", "openvino_model.bin"),
    "openvino-int8": ("openvino_int8.xml", "openvino_int8.bin"),
}


def load(folder: str | Path, name: Name, agreed: Contract, threads: int | None) -> Forward:
    """The student in `folder` in one of its forms.

    Raises `Refused` if a file is absent or cannot serve the contract, or the CPU does not compute in its numbers.

    `threads` is set for all of torch in this process, for the others for this engine alone; None leaves their default.
    """
    if name not in NAMES:
        raise Refused(f"no engine '{name}'; there are {', '.join(NAMES)}")
    if missing := [file for file in FILES[name] if not (Path(folder) / file).is_file()]:
        raise Refused(f"{folder} has no engine {name}: no {', '.join(missing)}")
    if reason := unable(name):
        raise Refused(f"{folder}: the engine {name} does not run here: {reason}")
    made: dict[Name, Callable[[], Forward]] = {
        "torch": lambda: Torch(Path(folder), agreed, threads),
        "torch-gpu": lambda: Torch(Path(folder), agreed, threads, "cuda", half()),
        "onnx": lambda: Onnx(Path(folder) / FILES["onnx"][0], threads),
        "openvino": lambda: OpenVINO(Path(folder) / FILES["openvino"][0], threads),
        "openvino-bf16": lambda: OpenVINO(Path(folder) / FILES["openvino-bf16"][0], threads, "bf16"),
        "openvino-int8": lambda: OpenVINO(Path(folder) / FILES["openvino-int8"][0], threads),
    }
    return made[name]()


def unable(name: Name) -> str | None:
    """Why this machine does not run a form; None where it does. OpenVINO itself would compute in float32, silently."""
    if name == "torch-gpu":
        return None if torch.cuda.is_available() else "torch sees no GPU: a replica has one with num_gpus: 1"
    if name != "openvino-bf16":
        return None
    able = openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in able else f"OpenVINO says that this CPU computes in {', '.join(able)}"


class Torch:
    """The weights as training left them, or rounded to fewer bits."""

    def __init__(
        self,
        folder: Path,
        agreed: Contract,
        threads: int | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = bert(folder, agreed)
        torch.nn.Module.to(self.model, torch.device(device), dtype)  # that of transformers has no types

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> list[float]:
        output = self.model(**rows.to(self.model.device).inputs(self.model))
        return cast(list[float], output.logits.squeeze(-1).float().tolist())


def half() -> torch.dtype:
    """Of 16 bits, that this GPU computes in."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class Onnx:
    """ONNX Runtime."""

    def __init__(self, file: Path, threads: int | None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: all cores
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._takes = [taken.name for taken in self._session.get_inputs()]

    def __call__(self, rows: Rows) -> list[float]:
        (logits,) = self._session.run(None, {name: given for name, given in feed(rows).items() if name in self._takes})
        return cast(list[float], logits[:, 0].tolist())


class OpenVINO:
    """OpenVINO, what is not in 8 bits in float32, or as the hint says."""

    def __init__(self, file: Path, threads: int | None, precision: str = "f32"):
        # Left to itself it computes in bfloat16 where the CPU can, and the same bundle would score otherwise elsewhere.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._model = openvino().Core().compile_model(file, "CPU", options)
        self._takes = [taken.any_name for taken in self._model.inputs]

    def __call__(self, rows: Rows) -> list[float]:
        logits = self._model({name: given for name, given in feed(rows).items() if name in self._takes})[0]
        return cast(list[float], logits[:, 0].tolist())


def feed(rows: Rows) -> dict[str, Any]:
    """Rows under the names of a BERT's inputs, as arrays of int64 [rows, longest]."""
    ids, real, segments = (tensor.long().numpy() for tensor in rows)
    return {"input_ids": ids, "attention_mask": real, "token_type_ids": segments}


def openvino() -> Any:
    """The module, kept from reporting its use.

    OpenVINO and NNCF report to Google Analytics when they are imported and used, unless a file in the home folder says
    no, or the package that sends is absent: here it is, for this process.
    """
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    import openvino

    return openvino


def bert(folder: Path, agreed: Contract) -> BertForSequenceClassification:
    """The model in float32, in evaluation mode. Raises `Refused` if it is not whole, or cannot serve its contract."""
    model, loading = cast(
        tuple[BertForSequenceClassification, dict[str, set[str]]],
        BertForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
    )
    # Of missing weights transformers only warns, and then serves scores from random ones.
    if loading["missing_keys"]:
        raise Refused(f"{folder} is no whole BertForSequenceClassification: no {sorted(loading['missing_keys'])}")
    labels, positions = model.config.num_labels, model.config.max_position_embeddings
    if labels != 1 or agreed.form != "encoder":
        raise Refused(f"{folder} has {labels} labels and the contract of a {agreed.form}: 1 and an encoder is right")
    if positions < agreed.max_tokens:
        raise Refused(f"{folder} has {positions} positions, too few for the {agreed.max_tokens} tokens of its contract")
    return model
