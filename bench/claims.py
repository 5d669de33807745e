"""One JSON line for each claim: what was measured, against what, and the bar it is held to."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALLER_IS_BETTER = {"s", "MiB"}
LEAST = 1e-3  # a measured 0 counts as this much, so that every ratio is a number

Line = dict[str, Any]


def against(
    claim: str, ours: Sequence[float], peer: Sequence[float], unit: str, bar: float | None, **more: Any
) -> Line:
    """Medians of both, and their ratio turned so that larger is better; `more` is added as it is."""
    mine, theirs = (max(statistics.median(measured), LEAST) for measured in (ours, peer))
    ratio = theirs / mine if unit in SMALLER_IS_BETTER else mine / theirs
    line = {"claim": claim, "ours": shown(mine), "peer": shown(theirs), "ratio": shown(ratio)}
    return line | {"unit": unit, "bar": bar, "runs": len(ours)} | more


def within(claim: str, ours: Sequence[float], limit: float, unit: str, **more: Any) -> Line:
    """A claim without a peer: `ratio` is the limit over what was measured, so its bar is 1."""
    return against(claim, ours, [limit], unit, 1.0, **more) | {"peer": None, "limit": limit}


def emit(line: Line, out: str | Path | None = None) -> None:
    """Prints the line, and adds it to the file `out` if one is given."""
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with Path(out).open("a") as file:
            file.write(text + "\n")


def shown(number: float) -> float:
    """Four digits that matter."""
    return float(f"{number:.4g}")
