"""One JSON line for each claim: what was measured, against what, and the bar it is held to."""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench import runs

SMALLER_IS_BETTER = {"s", "ms", "MiB"}
LEAST = 1e-3  # in a ratio a measured 0 counts as this much, so that every ratio is a number

Line = dict[str, Any]


def against(
    claim: str, ours: Sequence[float], peer: Sequence[float], unit: str, bar: float | None, **more: Any
) -> Line:
    """Medians of both, and their ratio turned so that larger is better; `more` is added as it is."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratio = _over(theirs, mine) if unit in SMALLER_IS_BETTER else _over(mine, theirs)
    line = {"claim": claim, "ours": shown(mine), "peer": shown(theirs), "ratio": shown(ratio)}
    return line | {"unit": unit, "bar": bar, "runs": len(ours)} | more


def within(claim: str, ours: Sequence[float], limit: float, unit: str, **more: Any) -> Line:
    """A claim without a peer: `ratio` is the limit over what was measured, so its bar is 1."""
    ratio = shown(_over(limit, statistics.median(ours)))
    return against(claim, ours, [limit], unit, 1.0, **more) | {"peer": None, "limit": limit, "ratio": ratio}


def _over(one: float, other: float) -> float:
    return max(one, LEAST) / max(other, LEAST)


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


def command(
    name: str,
    plan: Any,
    measurements: Mapping[str, Callable[[Any], Iterator[Line]]],
    small: Mapping[str, Any],
    given: Sequence[str] | None,
    about: str,
    asked_for: Sequence[str] = (),
    keeps: bool = False,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """The command line of a module of measurements. What `asked_for` names is not done unless chosen.

    The numbers of `plan`, a dataclass with a `folder`, are options; `small` is laid over it. What is made up may be
    kept for another run only where a module can go on from it. `parents` have options that the caller read before.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about.splitlines()[0], parents=[*parents])
    parser.add_argument("--small", action="store_true", help="everything tiny: that it runs, not how fast")
    parser.add_argument("--only", help=f"of {','.join(measurements)}; default all but {','.join(asked_for) or 'none'}")
    parser.add_argument("--out", type=Path, help="a file to add the lines to")
    if keeps:
        parser.add_argument("--folder", type=Path, help="where what is made up stays; default: nowhere")
    numbers = [field.name for field in fields(plan) if type(field.default) is int]
    for number in numbers:
        parser.add_argument(f"--{number.replace('_', '-')}", type=int, help=f"default {getattr(plan, number):,}")
    told = parser.parse_args(given)
    chosen = told.only.split(",") if told.only else [claim for claim in measurements if claim not in asked_for]
    if unknown := set(chosen) - set(measurements):
        parser.error(f"no claim {', '.join(sorted(unknown))}; there are {', '.join(measurements)}")
    runs.end_on_sigterm()
    own = {number: value for number in numbers if (value := getattr(told, number)) is not None}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = {"folder": (keeps and told.folder) or Path(folder)}
        made = plan(**(place | (dict(small) if told.small else {}) | own))
        for claim in chosen:
            for line in measurements[claim](made):
                emit(line, told.out)
    return 0
