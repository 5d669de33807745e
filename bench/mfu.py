"""Model FLOP utilisation of a GPU in both trainings of a decoder with random weights, and where its time goes.

The FLOPs that are counted are those that the model needs for its real tokens (Chowdhery et al., arXiv 2204.02311,
appendix B, and of causal attention the half that is not masked): padding, what is computed again, the loss and the
optimiser count as lost time.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import trainers
from disranker.contract import Tokens
from disranker.recipe import Finetune, Pretrain, Refused, Teacher

if TYPE_CHECKING:
    from torch import nn

    from disranker.fit import Progress, Task

Row = dict[str, Any]

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}  # bfloat16, dense
KINDS = {  # of an operation or a kernel, by words in its name, the first that fits
    "attention": ("attention", "flash", "softmax", "fmha", "sdpa"),
    "optimiser": ("adam", "foreach", "_fused", "norm_l2", "multi_tensor"),
    "matrix products": ("mm", "matmul", "linear", "conv", "nvjet", "cutlass"),
    "copies and casts": ("copy", "_to", "cat"),
}
WARM_UP, PROFILED = 3, 3  # steps


def flops(weights: int, layers: int, width: int, tokens: int, squares: int, causal: bool = True) -> int:
    """Of training steps over rows that have so many real tokens and sum of squared lengths: forward, and twice that.

    6 for each token and weight in a matrix product; for each layer 12 width n^2 of attention, or half if causal.
    """
    return 6 * weights * tokens + (6 if causal else 12) * layers * width * squares


def weights(model: "nn.Module") -> int:
    """How many weights take part in matrix products; a table of embeddings does only where the head is tied to it."""
    from torch import nn

    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def gpu(tflops: float = 0) -> tuple[str, float]:
    """Name of the GPU, and its peak in TFLOP/s where none is given. Raises `Refused` without a GPU that is known."""
    import torch

    if not torch.cuda.is_available():
        raise Refused("mfu: there is no GPU here (torch.cuda.is_available() is false), and this claim needs one")
    name = torch.cuda.get_device_name()
    if not (known := tflops or peak(name)):
        raise Refused(f"mfu: the peak of {name} is not known here; give it in bfloat16 as --peak-tflops")
    return name, known


def peak(name: str) -> float:
    """Of a GPU by the longest name that fits; 0 where none does."""
    return max(((len(known), tflops) for known, tflops in PEAK_TFLOPS.items() if known in name), default=(0, 0.0))[1]


def pretraining(rows: Sequence[Row], size: Teacher, cfg: Pretrain, device: str, seed: int) -> Row:
    from disranker import pretraining, teacher

    with tempfile.TemporaryDirectory() as folder:
        tokens = _start(Path(folder), rows, size, seed)
        clicked = [
            {"query": row["query"], **doc, "band": "head", "attractiveness": 1.0, "satisfied_share": 0.0}
            for row in rows
            for doc in row["docs"]
        ]
        task = pretraining.Pretraining(clicked, [], tokens, cfg)
        return _measured(task, teacher.language_model(folder), cfg, device, seed)


def finetuning(rows: Sequence[Row], size: Teacher, cfg: Finetune, device: str, seed: int) -> Row:
    from disranker import teacher

    with tempfile.TemporaryDirectory() as folder:
        tokens = _start(Path(folder), rows, size, seed)
        task = teacher.Ranking(rows, [], tokens, cfg)
        return _measured(task, teacher.scorer(folder, tokens, seed), cfg, device, seed)


def shares(times: Mapping[str, float]) -> dict[str, float]:
    """Of the time of all operations by name, the share of each kind."""
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, seconds in times.items():
        found[_kind(name)] += seconds
    total = sum(found.values()) or 1.0
    return {kind: round(seconds / total, 3) for kind, seconds in found.items()}


def device_times(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Seconds of the device by name, of what torch's profiler averaged.

    On a GPU, as in torch's own total, of kernels alone: the operation that started one, and what a program names around
    it, have the same time again.
    """
    from torch.autograd import DeviceType

    if not on_gpu:
        return {event.key: event.self_cpu_time_total / 1e6 for event in events}
    kernels = (event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation)
    return {event.key: event.self_device_time_total / 1e6 for event in kernels}


def _kind(name: str) -> str:
    fitting = (kind for kind, words in KINDS.items() if any(word in name.lower() for word in words))
    return next(fitting, "other")


def _start(folder: Path, rows: Sequence[Row], size: Teacher, seed: int) -> Tokens:
    from disranker import teacher

    texts = (text for row in rows for doc in row["docs"] for text in (row["query"], doc["title"], doc["summary"]))
    teacher.scratch(folder, texts, size, seed)
    return Tokens.agree(folder, "decoder", size)


def _measured(task: "Task", model: "nn.Module", cfg: Pretrain | Finetune, device: str, seed: int) -> Row:
    """FLOPs a second after the warm-up, then the shares of the last steps."""
    from disranker import fit, teacher

    hugging_face = teacher.hugging_face(model)
    config: Any = hugging_face.config
    planned = fit.steps(task, cfg, seed)
    if len(planned) <= WARM_UP + PROFILED:
        raise Refused(f"mfu: {len(planned)} steps are too few; take more lists or fewer gpu_tokens_per_batch")
    run = fit.Fit(model.to(device), task, planned, cfg, seed)
    steps = run.steps()
    _run(steps, WARM_UP)
    seen, began = trainers.Seen().watch(hugging_face), time.monotonic()
    _run(steps, len(planned) - WARM_UP - PROFILED)
    tokens, squares = int(seen.tokens), int(seen.squares)  # waits for the GPU
    seconds = time.monotonic() - began
    done = flops(weights(model), config.num_hidden_layers, config.hidden_size, tokens, squares)
    said = {"tflops": done / seconds / 1e12, "tokens_per_s": tokens / seconds, "padding": seen.padding()}
    return said | {"weights": weights(model)} | _profiled(steps, device)


def _run(steps: "Iterator[Progress]", count: int) -> None:
    for _ in range(count):
        next(steps)


def _profiled(steps: "Iterator[Progress]", device: str) -> Row:
    """Over the last steps: the share of the time in which the device was busy, and what it was busy with."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device != "cpu"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiled:
        began = time.monotonic()
        _run(steps, PROFILED)
        seconds = time.monotonic() - began
    times = device_times(profiled.key_averages(), on_gpu)
    return {"busy": min(1.0, round(sum(times.values()) / seconds, 3)), "of_busy": shares(times)}
