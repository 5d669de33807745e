"""How fast a student scores in each form, on lists of real length mix, as a share of what the cores can multiply.

    python -m bench.engine                                  random weights in the size of MiniLM-L6, made-up lists
    python -m bench.engine --store runs/esci                the student of a finished run, on its test lists
    python -m bench.engine --store runs/esci --of teacher   its teacher, where that is a BERT

One list at a time as a request brings them, tokenised before, all forms by turns in one process. Beside the engines of
a bundle: torch in bfloat16, ONNX Runtime in 8 bits (dynamic). A form that the CPU cannot compute in is named with its
reason and not measured. The chosen one is the fastest of those that the gate lets through.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import arms, claims, mfu, runs, train
from bench.claims import Line
from disranker import metrics
from disranker import recipe as recipes
from disranker.recipe import Publish
from disranker.store import Store

if TYPE_CHECKING:
    import torch

    from disranker.contract import Contract
    from disranker.engine import Engine
    from disranker.engines import Forward, Name

BAR = 4.0  # times torch in float32, of the engine that is chosen
SIDE = 1024  # of the square matrices of which the peak is measured
DYNAMIC = "model_int8.onnx"

Form = Callable[[Path, "Contract", int], "Forward"]


@dataclass(frozen=True)
class Plan:
    root: str  # of a run with groups and the model
    of: str  # the artefact with the model
    lists: int
    calibration: int
    rounds: int
    threads: int


def measure(plan: Plan) -> Iterator[Line]:
    """A line for each form against torch in float32, then one for the engine that is chosen."""
    from disranker import engines, speed
    from disranker.engine import Engine

    tested, unable = speed.spread(arms.listed(plan.root, "test"), plan.lists), refused()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(plan, folder)
        tokens = Engine(folder).tokens
        made = {form: _engine(folder, form, plan.threads) for form in FORMS if form not in unable}
        lists = [tokens.listed(group["query"], group["docs"]) for group in tested]
        rates = speed.rates(made, lists, plan.rounds)
        scored = {form: speed.run(engine, tested) for form, engine in made.items()}
        cost = flops(engines.bert(folder, tokens.contract), [len(ids) for prompts in lists for ids, _ in prompts])
    agreed = speed.agreement(metrics.judged(tested), scored)
    peaks = {precision: peak(precision, plan.rounds) for precision in {PRECISION[form] for form in made}}
    shared = {"threads": plan.threads, "lists": len(lists), "pairs": sum(map(len, lists))}
    for form, rate in rates.items():
        best = peaks[PRECISION[form]]
        more = {"of_peak": claims.shown(rate * cost / best), "peak_gflops": claims.shown(best / 1e9)}
        yield _line(f"engine: {form}", form, rates, agreed, None, **shared, **more)
    for form, reason in unable.items():
        yield {"claim": f"engine: {form}", "ours": None, "refused": reason}
    passing = [form for form in speed.CHOICE if form in made and passes(form, agreed)]
    chosen = speed.choose({form: {"pairs_per_s": [rates[form]]} for form in passing})
    yield _line("engine: chosen", chosen, rates, agreed, BAR, chosen=chosen, passing=passing, **shared)


def passes(form: str, agreed: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the gate lets this engine through, by what `speed.agreement` found."""
    from disranker import gate

    return all(bar.passed for bar in gate.engines({name: agreed[name] for name in {"torch", form}}, Publish()))


def made_up(folder: Path, small: bool) -> str:
    """The root of a store with made-up lists and a student of random weights, in the size of MiniLM-L6 or tiny."""
    from disranker import student
    from disranker.contract import Tokens

    plan = train.Plan(folder, **(train.SMALL if small else {}))
    recipe = recipes.load(plan.recipe(None, plan.lists))
    store = Store(recipe.root)
    rows = store.read("groups").to_pylist()
    store.write("groups", 0, [row | {"split": ("test", "train")[place % 2]} for place, row in enumerate(rows)])
    made = Path(store.at("student"))
    student.shortened(recipe.student.base, made, recipe.student, recipe.seed)
    Tokens.agree(made, "encoder", recipe.student).contract.save(made)
    return recipe.root


def export(plan: Plan, folder: Path) -> None:
    """The model and all its forms; 8 bits are calibrated with training lists."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from disranker import conversion, engines
    from disranker.engine import Engine

    shutil.copytree(Store(plan.root).folder(plan.of), folder, dirs_exist_ok=True)
    tokens = Engine(folder).tokens
    trained = arms.listed(plan.root, "train")[: plan.calibration]
    conversion.export(folder, folder, [p for group in trained for p in tokens.listed(group["query"], group["docs"])])
    quantize_dynamic(folder / engines.FILES["onnx"][0], folder / DYNAMIC, weight_type=QuantType.QInt8)


def refused() -> dict[str, str]:
    """form -> why this CPU is not asked for it."""
    from disranker import engines

    return {name: reason for name in engines.NAMES if name in FORMS and (reason := engines.unable(name))}


def flops(model: "torch.nn.Module", lengths: list[int]) -> float:
    """Of the mean pair, forward: 2 for each real token and weight in a matrix product, and attention."""
    config: Any = model.config
    squares = sum(length * length for length in lengths)
    whole = mfu.flops(
        mfu.weights(model), config.num_hidden_layers, config.hidden_size, sum(lengths), squares, causal=False
    )
    return whole / 3 / len(lengths)


def peak(precision: str, rounds: int) -> float:
    """Multiplications and additions a second of square matrices, by torch with its threads."""
    import torch

    one, other = (torch.randn(SIDE, SIDE) for _ in range(2))
    if precision == "int8":
        a, b = (matrix.mul(30).to(torch.int8) for matrix in (one, other))
        multiply: Callable[[], Any] = lambda: torch._int_mm(a, b)  # noqa: E731
    else:
        a, b = (matrix.to(getattr(torch, precision)) for matrix in (one, other))
        multiply = lambda: a @ b  # noqa: E731
    times = [_seconds(multiply) for _ in range(max(5, 10 * rounds))]
    return 2 * SIDE**3 / statistics.median(times)


def _engine(folder: Path, form: str, threads: int) -> "Engine":
    from disranker.engine import Engine

    engine = Engine(folder, threads)
    engine._forward = FORMS[form](folder, engine.tokens.contract, threads)
    return engine


def _torch_bfloat16(folder: Path, agreed: "Contract", threads: int) -> "Forward":
    from disranker import engines

    forward = engines.Torch(folder, agreed, threads)
    forward.model.bfloat16()
    return forward


def _onnx_int8(folder: Path, _: "Contract", threads: int) -> "Forward":
    from disranker import engines

    return engines.Onnx(folder / DYNAMIC, threads)


def _bundled(name: "Name") -> Form:
    def load(folder: Path, agreed: "Contract", threads: int) -> "Forward":
        from disranker import engines

        return engines.load(folder, name, agreed, threads)

    return load


FORMS: dict[str, Form] = {
    "torch": _bundled("torch"),
    "torch-bf16": _torch_bfloat16,
    "onnx": _bundled("onnx"),
    "onnx-int8": _onnx_int8,
    "openvino": _bundled("openvino"),
    "openvino-bf16": _bundled("openvino-bf16"),
    "openvino-int8": _bundled("openvino-int8"),
}
PRECISION = {
    form: "int8" if "int8" in form else "bfloat16" if "bf16" in form else "float32" for form in FORMS
}  # of its matrices


def _line(
    claim: str,
    form: str,
    rates: Mapping[str, float],
    agreed: Mapping[str, Mapping[str, Any]],
    bar: float | None,
    **more: Any,
) -> Line:
    near = {name: value and claims.shown(value) for name, value in agreed[form].items()}
    return claims.against(claim, [rates[form]], [rates["torch"]], "pairs/s", bar, **near, **more)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", help="root of a run with groups and the model; default: made up")
    parser.add_argument("--of", default="student", choices=("student", "teacher"), help="default student")
    parser.add_argument("--small", action="store_true", help="a tiny model, few lists: that it runs, not how fast")
    parser.add_argument("--lists", type=int, default=60, help="of the test split; default 60")
    parser.add_argument("--calibration", type=int, default=100, help="training lists; default 100")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    parser.add_argument("--out", type=Path, help="a file to add the lines to")
    given = parser.parse_args(argv)
    runs.end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = given.store or made_up(Path(folder), given.small)
        rounds = 1 if given.small else given.rounds
        plan = Plan(root, given.of, given.lists, given.calibration, rounds, given.threads)
        for line in measure(plan):
            claims.emit(line, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
