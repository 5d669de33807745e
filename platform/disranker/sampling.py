"""Which queries, which candidates; splits by hash of the query; frequency bands."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from disranker.recipe import Aggregate, Sample
from disranker.tables import BANDS

Row = dict[str, Any]


def uniform(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(hashed) / 2**64


def split(query: str, cfg: Aggregate, seed: int) -> str:
    """train, validation or test: by the query, so that no query is ever in two."""
    place = uniform(query, seed)
    if place < cfg.test_share:
        return "test"
    return "validation" if place < cfg.test_share + cfg.validation_share else "train"


def band_limits(searches: Sequence[int] | np.ndarray, head_share: float, torso_share: float) -> tuple[int, int]:
    """(least searches of a head query, least of a torso query), from the searches of each query.

    The most frequent queries that make up `head_share` of all searches are the head; equal frequencies stay together.
    """
    if not len(searches):
        return 1, 1
    falling = np.sort(np.asarray(searches))[::-1]
    covered = np.cumsum(falling) / falling.sum()
    head, torso = (
        falling[np.searchsorted(covered, share)] for share in (head_share, min(1.0, head_share + torso_share))
    )
    return int(head), int(torso)


def band(searches: int, limits: tuple[int, int]) -> str:
    if not searches:
        return "unseen"
    head, torso = limits
    return "head" if searches >= head else "torso" if searches >= torso else "tail"


def quotas(queries: Mapping[str, int], cfg: Sample) -> dict[str, float]:
    """The share of ungraded queries to take, by band, from how many there are of each.

    As the recipe says, but with the tail at its floor: all of the tail if need be, then less of the other bands.
    """
    shares = {band: getattr(cfg.ungraded, band) for band in BANDS}
    tail, others = (
        sum(shares[band] * queries.get(band, 0) for band in bands) for bands in (("tail",), ("head", "torso"))
    )
    floor = cfg.tail_floor / (1 - cfg.tail_floor)  # of the tail to the others
    if not queries.get("tail") or tail >= floor * others:
        return shares
    shares["tail"] = min(1.0, floor * others / queries["tail"])
    give = min(1.0, shares["tail"] * queries["tail"] / (floor * others))
    return shares | {band: shares[band] * give for band in ("head", "torso")}


def ends(scores: Sequence[float], share: float) -> list[bool]:
    """Which places of a list hold its best and its worst, in equal parts, that make up a share of it: two at least.

    The idea of RRADistill (arXiv 2410.18097): the middle of a cheap ranking teaches least.
    """
    most = max(2, math.ceil(share * len(scores)))
    falling = sorted(range(len(scores)), key=lambda place: -scores[place])
    chosen = {*falling[: (most + 1) // 2], *falling[len(falling) - most // 2 :]}
    return [place in chosen for place in range(len(scores))]


def candidates(
    query: str,
    grades: Mapping[str, int],
    evidence: Sequence[Row],
    ranked: Iterable[str],
    doc_ids: Sequence[str],
    cfg: Sample,
    seed: int,
) -> list[tuple[str, str]]:
    """(doc_id, source) for one training query: graded, shown, first by BM25 of those never shown, random; each once.

    evidence: rows of this query; ranked: doc_ids by BM25; doc_ids: the whole catalogue.
    """
    # No order in a file decides which graded ones are cut off.
    graded = sorted(grades, key=lambda doc_id: uniform(f"{query}\t{doc_id}", seed))
    chosen = dict.fromkeys(graded[: cfg.judged], "judged")
    seen = [row["doc_id"] for row in sorted(evidence, key=lambda row: (-row["impressions"], row["doc_id"]))]
    shown = set(seen)
    unseen = [doc_id for doc_id in ranked if doc_id not in shown]
    for source, found, most in (("shown", seen, cfg.shown), ("bm25", unseen, cfg.bm25)):
        fresh = [doc_id for doc_id in found if doc_id not in chosen]
        chosen |= dict.fromkeys(fresh[:most], source)
    wanted = min(len(chosen) + cfg.random, len(doc_ids))
    draws = np.random.default_rng(int(uniform(query, seed) * 2**53))
    while len(chosen) < wanted:
        chosen.setdefault(doc_ids[int(draws.integers(len(doc_ids)))], "random")
    return list(chosen.items())


def group(
    query: Row,
    docs: Iterable[tuple[str, str]],
    texts: Mapping[str, Row],
    evidence: Sequence[Row],
    grades: Mapping[str, int],
) -> Row:
    """A row of the table `groups`. Documents that the catalogue lacks are left out."""
    clicked = {row["doc_id"]: row for row in evidence}
    listed = [
        {
            "doc_id": doc_id,
            "title": texts[doc_id]["title"],
            "summary": texts[doc_id]["summary"],
            "source": source,
            "grade": grades.get(doc_id),
            "attractiveness": clicked.get(doc_id, {}).get("attractiveness"),
            "impressions": clicked.get(doc_id, {}).get("impressions"),
            "asked": True,
        }
        for doc_id, source in docs
        if doc_id in texts
    ]
    return {"query": query["query"], "split": query["split"], "band": query["band"], "docs": listed}
