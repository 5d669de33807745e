"""A few lists that a bundle carries, with the scores that each engine gave them where the bundle was made.

Whoever loads the bundle scores them again: an engine that computes something else there, or files that do not belong
together, show before a user sees them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from disranker.bundle import SELFTEST
from disranker.engine import Engine
from disranker.engines import Name
from disranker.inputs import Settings
from disranker.metrics import Run
from disranker.recipe import Refused

LISTS, DOCUMENTS = 4, 8
# Of the range of the recorded scores: how far one may be from the score that was recorded. bfloat16 is rounded after
# other steps on another CPU; 8 bits are computed otherwise where there are no instructions for them, and saturate.
FLOAT32, ROUNDED = 0.01, {"torch-gpu": 0.1, "openvino-bf16": 0.1, "openvino-int8": 0.25}
# Where a bundle is made there need be no GPU: what torch gave there is what it has to give.
RECORDED_AS: dict[Name, Name] = {"torch-gpu": "torch"}


class Pair(Settings):
    query: str
    title: str
    summary: str


class SelfTest(Settings):
    format: Literal[1] = 1
    pairs: list[Pair]
    scores: dict[Name, list[float]]  # engine -> a logit of each pair


def made(groups: Sequence[Mapping[str, Any]], runs: Mapping[Name, Run]) -> SelfTest:
    """From rows of `groups` and what the engines gave them (engine -> query -> document -> score)."""
    rows = [(group["query"], doc) for group in groups[:LISTS] for doc in group["docs"][:DOCUMENTS]]
    return SelfTest(
        pairs=[Pair(query=query, title=doc["title"], summary=doc["summary"]) for query, doc in rows],
        scores={name: [run[query][doc["doc_id"]] for query, doc in rows] for name, run in runs.items()},
    )


def check(folder: str | Path, engine: Engine, name: Name) -> None:
    """Raises `Refused` where the engine gives no finite score, or others than were recorded of it in the bundle.

    A bundle without a self-test has nothing to be compared with: its engine has to give finite scores.
    """
    if (file := Path(folder) / SELFTEST).is_file():
        test = SelfTest.model_validate_json(file.read_bytes())
    else:
        test = SelfTest(pairs=[Pair(query="query", title="title", summary="summary")], scores={})
    found = engine.scores(*([getattr(pair, part) for pair in test.pairs] for part in ("query", "title", "summary")))
    if not all(map(math.isfinite, found)):
        raise Refused(f"{folder}: {name} gives scores that are no finite numbers")
    if not (expected := test.scores.get(RECORDED_AS.get(name, name))):
        return
    allowed = ROUNDED.get(name, FLOAT32) * (max(expected) - min(expected) or 1.0)
    far = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if far > allowed:
        raise Refused(f"{folder}: {name} fails the self-test: a score is {far:.3g} off, {allowed:.3g} is allowed")
