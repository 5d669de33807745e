"""Two rankings side by side and what people say of them: Good, Same or Bad. `python -m serve.judgments` counts.

As in the human evaluation of DisRanker: the new ranking is better than the old one (good), as good, or worse (bad).
Whoever judges sees a left and a right one and not which is which, since a name would sway them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import polars as pl
import pydantic
from scipy import stats

from disranker import sampling
from disranker.recipe import Refused
from serve.dialects import Scored, Text, sigmoid, truncation
from serve.rollout import NAME

Side = Literal["old", "new"]
Verdict = Literal["good", "same", "bad"]
Name = Annotated[str, pydantic.Field(pattern=f"^{NAME}$")]

PREFIX = "gsb_judgments"  # of files
GIVEN = "given"  # the order in which documents were given, in the place of a bundle
LEFT = 2  # seed of a draw
TURNED: Mapping[Verdict, Verdict] = {"good": "bad", "same": "same", "bad": "good"}
RESAMPLES = 10_000
SCHEMA = dict.fromkeys(
    ("id", "timestamp", "request_id", "judge", "query", "old", "new", "left", "verdict"), pl.String()
)


def left(request_id: str) -> Side:
    """Which of both stands left: each as often, and the same one whoever asks, so that no client has to be believed."""
    return "old" if sampling.uniform(request_id, LEFT) < 0.5 else "new"


@dataclass(frozen=True)
class Ranking:
    """Documents in an order."""

    name: Literal["given", "live", "candidate"]
    bundle: str  # its digest, or `GIVEN`
    order: list[int]  # places, best first
    logits: list[float] | None = None  # by place

    @classmethod
    def by(cls, name: Literal["live", "candidate"], bundle: str, scored: Scored) -> "Ranking":
        return cls(name, bundle, scored.ranked(), scored.logits)

    def reply(self, other: "Ranking") -> dict[str, Any]:
        """`move`: how many ranks higher a document stands here than in the other one."""
        there = {place: rank for rank, place in enumerate(other.order)}
        results = [
            {
                "index": place,
                "relevance_score": sigmoid(self.logits[place]) if self.logits else None,
                "move": there[place] - rank,
            }
            for rank, place in enumerate(self.order)
        ]
        return {"name": self.name, "bundle": self.bundle, "results": results}


@dataclass(frozen=True)
class Comparison:
    """What is to be judged (`new`), and what it is judged against (`old`)."""

    old: Ranking
    new: Ranking
    scored: Scored  # the one of both that a present bundle gave

    def reply(self) -> dict[str, Any]:
        request_id, warning = self.scored.request_id, truncation(self.scored)
        return {
            "id": request_id,
            "model": self.scored.model,
            "left": left(request_id),
            "old": self.old.reply(self.new),
            "new": self.new.reply(self.old),
            "meta": {"warnings": [warning]} if warning else {},
        }


class Judgment(pydantic.BaseModel):
    """What somebody says of the right ranking against the left one, of a reply of /v1/compare."""

    id: Name  # made by whoever judges: of one that comes again only the first counts
    request_id: Name  # `id` of that reply
    query: Text
    old: Name  # `bundle` of each
    new: Name
    right_is: Verdict

    def row(self, judge: str, time: float) -> dict[str, Any]:
        """As it is written: `verdict` is of new against old, wherever they stood. `time` in seconds since 1970."""
        side = left(self.request_id)
        return {
            "id": self.id,
            "timestamp": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "judge": judge,
            "query": self.query,
            "old": self.old,
            "new": self.new,
            "left": side,
            "verdict": self.right_is if side == "old" else TURNED[self.right_is],
        }


def counted(folder: str | Path) -> pl.DataFrame:
    """A row for each pair of bundles: good, same, bad, delta, its 95% interval (low, high) and p.

    Of judgments with the same judge and id the first counts: the later ones were given with the names in sight. Raises
    `Refused` where there are none, or where a file holds something else.
    """
    files = sorted(Path(folder).glob(f"{PREFIX}-*.ndjson"))
    if not files:
        raise Refused(f"{folder}: no {PREFIX}-*.ndjson; a file has that name when it is full or old")
    try:
        rows = pl.scan_ndjson(files, schema=SCHEMA).collect()
    except pl.exceptions.PolarsError as error:
        raise Refused(f"{folder}: not all lines are judgments: {error}") from error
    first = rows.sort("timestamp", maintain_order=True).unique(["judge", "id"], keep="first", maintain_order=True)
    counts = [(pl.col("verdict") == verdict).sum().alias(verdict) for verdict in get_args(Verdict)]
    pairs = first.group_by("old", "new").agg(counts).sort("old", "new")
    return pl.DataFrame([pair | gain(pair["good"], pair["same"], pair["bad"]) for pair in pairs.to_dicts()])


def gain(good: int, same: int, bad: int) -> dict[str, float]:
    """Delta GSB, (good - bad) / all, with its 95% bootstrap interval; p of the exact sign test, which leaves out same.

    Few judgments that all agree have an interval of one point; p tells that they are few.
    """
    judged = good + same + bad
    drawn = np.random.default_rng(0).multinomial(judged, np.array([good, same, bad]) / judged, RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 2]) / judged, [0.025, 0.975])
    p = stats.binomtest(good, good + bad).pvalue if good + bad else 1.0
    return {"delta": (good - bad) / judged, "low": float(low), "high": float(high), "p": float(p)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.judgments", description="Counts Good, Same and Bad.")
    parser.add_argument("folder", metavar="FOLDER", help="the one that the setting `records` names")
    try:
        found = counted(parser.parse_args(argv).folder)
    except Refused as error:
        parser.error(str(error))
    print(f"{'new':<14}{'against':<14}{'good':>6}{'same':>6}{'bad':>6}  ΔGSB")
    for row in found.to_dicts():
        numbers = f"{row['delta']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], p = {row['p']:.2g}"
        counts = "".join(f"{row[verdict]:>6}" for verdict in get_args(Verdict))
        print(f"{row['new'][:12]:<14}{row['old'][:12]:<14}{counts}  {numbers}")


if __name__ == "__main__":
    main()
