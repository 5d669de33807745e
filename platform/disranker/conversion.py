"""A student as ONNX, and as OpenVINO in float32 and in 8 bits."""

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disranker import engines
from disranker.batches import Rows
from disranker.contract import Tokens
from disranker.engine import Prompt, cut
from disranker.recipe import Refused

TOKENS_PER_SAMPLE = 1024  # of the calibration, padding included
OPSET = 17


def export(student: str | Path, target: str | Path, prompts: Sequence[Prompt] | None) -> None:
    """Writes the files of the engines beside torch into `target`, which exists.

    `prompts` are those of real pairs, with which the 8 bits are calibrated; None: there will be no openvino-int8.
    Raises `Refused` for a student that is none, or without any prompt.
    """
    if prompts is not None and not prompts:
        raise Refused("the 8-bit engine needs pairs to be calibrated with, and there are none")
    tokens, target = Tokens.load(student), Path(target)
    model = engines.bert(Path(student), tokens.contract)
    _onnx(model, target / engines.FILES["onnx"][0], tokens.contract.pad)
    openvino = engines.openvino()
    graph = openvino.Core().read_model(target / engines.FILES["onnx"][0])
    _save(graph, target, "openvino")
    if prompts is not None:
        _save(_int8(graph, model, prompts, tokens.contract.pad), target, "openvino-int8")


class _Logits(nn.Module):
    """A model that gives the logits alone, of inputs in a fixed order."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _onnx(model: nn.Module, file: Path, pad: int) -> None:
    """Writes a graph for any number of rows of any length."""
    # Rows of two lengths, so that the mask counts in what is traced.
    example = Rows.padded([([pad] * 5, 2), ([pad] * 3, 2)], pad).inputs(model)
    sizes = {name: {0: "rows", 1: "tokens"} for name in example} | {"logits": {0: "rows"}}
    with warnings.catch_warnings():  # of branches on the padding, which a BERT does not take
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(model, list(example)).eval(),
            tuple(example.values()),
            file,
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes=sizes,
            opset_version=OPSET,
            dynamo=False,  # the other exporter needs onnxscript
        )


def _int8(graph: Any, model: nn.Module, prompts: Sequence[Prompt], pad: int) -> Any:
    """The graph with weights and activations of its matrices in 8 bits (NNCF: static, after training)."""
    import nncf  # after engines.openvino(), which keeps it from reporting

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own setter silences the handlers of others as well
    batches = [
        Rows.padded([prompts[row] for row in rows], pad)
        for rows in cut([len(ids) for ids, _ in prompts], TOKENS_PER_SAMPLE)
    ]
    takes = Rows.padded(prompts[:1], pad).inputs(model)
    samples = [{name: given for name, given in engines.feed(rows).items() if name in takes} for rows in batches]
    with contextlib.redirect_stdout(io.StringIO()):  # of progress bars
        return nncf.quantize(
            graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )


def _save(graph: Any, target: Path, name: engines.Name) -> None:
    # Without the flag weights become float16.
    engines.openvino().save_model(graph, target / engines.FILES[name][0], compress_to_fp16=False)
