"""What a student must reach to be released: one bar for each claim that a bundle makes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from disranker import metrics
from disranker.metrics import Qrels, Run
from disranker.recipe import Evaluate, Publish
from disranker.report import HEADLINE, Report

# engine whose numbers are rounded -> the setting that leaves it out
ROUNDED = {"openvino-bf16": "publish.bf16", "openvino-int8": "publish.int8"}


@dataclass(frozen=True)
class Bar:
    """A number and the bound that it must keep; without a number it is not kept."""

    name: str  # the setting of `publish` that asks for it
    value: float | None
    sign: Literal[">", ">=", "<="]
    bound: float
    why: str  # a sentence for who must mend it

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return {">": self.value > self.bound, ">=": self.value >= self.bound, "<=": self.value <= self.bound}[self.sign]

    @property
    def line(self) -> str:
        """The bar in one line, with how far the number is from its bound."""
        if self.value is None:
            return f"{self.name}: not measured, FAILED"
        gap, verdict = self.value - self.bound, "passed" if self.passed else "FAILED"
        return f"{self.name}: {self.value:.6g} {self.sign} {self.bound:.6g} ({gap:+.3g}), {verdict}"


def content(bars: Sequence[Bar]) -> dict[str, Any]:
    """What goes into gate.json."""
    return {
        "passed": all(bar.passed for bar in bars),
        "bars": [asdict(bar) | {"passed": bar.passed, "line": bar.line} for bar in bars],
    }


def reasons(bars: Sequence[Bar]) -> list[str]:
    """Why the student must not be released, a sentence each; empty where it may."""
    return [bar.why for bar in bars if not bar.passed]


def quality(report: Report, cfg: Publish) -> list[Bar]:
    """The student against the teacher and BM25, by what the evaluation found."""
    bars = [_teacher(report, cfg)]
    return [*bars, _bm25(report)] if cfg.beat_bm25 else bars


def in_service(qrels: Qrels, new: Run, old: Run, cfg: Publish, evaluate: Evaluate, seed: int) -> Bar:
    """The student against the one that serves now, on the same lists.

    The new one has to show that it loses no more than `max_loss`: the low end of the paired interval of new less old
    lies above it. A test of fewer queries has a wider interval, and is harder to pass, not easier.
    """
    found = metrics.compare(metrics.tally(qrels, new), metrics.tally(qrels, old), evaluate, seed)[HEADLINE]
    return Bar(
        "max_loss",
        found.low,
        ">",
        -cfg.max_loss,
        f"The student may be worse than the one in service: the difference in NDCG@10 on {len(qrels):,} queries is "
        f"{_signed(found.difference)}, its {evaluate.confidence:.0%} interval [{_signed(found.low)}, "
        f"{_signed(found.high)}] must lie above {-cfg.max_loss:+.4f} (publish.max_loss).",
    )


def engines(measured: Mapping[str, Mapping[str, Any]], cfg: Publish) -> list[Bar]:
    """Each engine against torch, by what `speed.agreement` found: float32 to the digit, the others by how they rank."""
    bars = [_parity(name, of, cfg) for name, of in measured.items() if name in ("onnx", "openvino")]
    for name in [name for name in ROUNDED if name in measured]:
        rounded = measured[name]
        bars += [_loss(name, rounded[HEADLINE], measured["torch"][HEADLINE], cfg)]
        bars += [_order(name, rounded["kendall_tau"], cfg)]
    return bars


def _teacher(report: Report, cfg: Publish) -> Bar:
    student, teacher = (_value(report, name) for name in ("student", "teacher"))
    if student is None or teacher is None:
        return Bar("min_share_of_teacher", None, ">=", cfg.min_share_of_teacher, _absent(report, "student", "teacher"))
    if not teacher:
        why = "The teacher's NDCG@10 is 0: a share of it says nothing. Were its labels found?"
        return Bar("min_share_of_teacher", None, ">=", cfg.min_share_of_teacher, why)
    return Bar(
        "min_share_of_teacher",
        student,
        ">=",
        cfg.min_share_of_teacher * teacher,
        f"The student's NDCG@10 of {student:.4f} is {student / teacher:.2%} of the teacher's {teacher:.4f}; "
        f"publish.min_share_of_teacher asks for {cfg.min_share_of_teacher:.2%}, which is "
        f"{cfg.min_share_of_teacher * teacher - student:.4f} more.",
    )


def _bm25(report: Report) -> Bar:
    if _value(report, "student") is None or _value(report, "bm25") is None:
        return Bar("beat_bm25", None, ">", 0.0, _absent(report, "student", "bm25"))
    pair = next(p for p in report["pairs"] if (p["a"], p["b"], p["metric"]) == ("student", "bm25", HEADLINE))
    return Bar(
        "beat_bm25",
        pair["low"],
        ">",
        0.0,
        f"The student is not shown to beat BM25: the difference in NDCG@10 is {pair['difference']:+.4f}, its "
        f"{report['confidence']:.0%} interval [{pair['low']:+.4f}, {pair['high']:+.4f}] must lie above 0 "
        "(publish.beat_bm25).",
    )


def _parity(name: str, measured: Mapping[str, Any], cfg: Publish) -> Bar:
    gap = measured["max_difference"]
    found = "no number" if gap is None else f"{gap:.2e}"
    return Bar(
        f"max_difference, {name}",
        gap,
        "<=",
        cfg.max_difference,
        f"A score of {name} differs from torch's by {found}; publish.max_difference allows {cfg.max_difference:.2e}.",
    )


def _loss(name: str, rounded: float | None, exact: float, cfg: Publish) -> Bar:
    least = (1 - cfg.max_rounding_loss) * exact
    if rounded is None:
        why = f"A score of {name} is no finite number; {ROUNDED[name]}=false releases the student without."
        return Bar(f"max_rounding_loss, {name}", None, ">=", least, why)
    return Bar(
        f"max_rounding_loss, {name}",
        rounded,
        ">=",
        least,
        f"As {name} the student's NDCG@10 is {rounded:.4f}, {least - rounded:.4f} below the least that "
        f"publish.max_rounding_loss {cfg.max_rounding_loss:.2%} allows under {exact:.4f}; {ROUNDED[name]}=false "
        "releases it without.",
    )


def _order(name: str, tau: float | None, cfg: Publish) -> Bar:
    found = "no number" if tau is None else f"{tau:.4f}"
    return Bar(
        f"min_rounding_tau, {name}",
        tau,
        ">=",
        cfg.min_rounding_tau,
        f"As {name} the student ranks otherwise than in float32: Kendall's tau is {found}, publish.min_rounding_tau "
        f"asks for {cfg.min_rounding_tau:.4f}; {ROUNDED[name]}=false releases it without.",
    )


def _value(report: Report, name: str) -> float | None:
    value: float | None = report["runs"].get(name, {}).get(HEADLINE, {}).get("value")
    return value


def _absent(report: Report, *names: str) -> str:
    absent = [name for name in names if _value(report, name) is None]
    return f"The report has no run of {', '.join(absent)}, so the student cannot be compared with it."


def _signed(value: float | None) -> str:
    return "no number" if value is None else f"{value:+.4f}"
