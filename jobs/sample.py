"""Evidence and documents -> pre-training examples, and for each query its list of candidates with their texts."""

import sys
from collections import Counter
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from disranker import sampling
from disranker.recipe import Recipe, Refused
from disranker.retrieval import BM25
from disranker.stages import Step
from disranker.store import Store
from disranker.tables import BANDS
from jobs import launch, parts

Row = dict[str, Any]


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    shares = sampling.quotas(_ungraded(store), recipe.sample)
    said = parts.each_by(recipe.ingest.parts, Sampler, recipe, store, shares)
    counts = parts.total(said)
    if not counts["train"]:
        raise Refused(
            "sample: no training query has two documents that the catalogue knows; "
            "do data.documents belong to these logs?"
        )
    if not counts["test"]:
        raise Refused(
            "sample: no test query has graded documents, so nothing could be measured; "
            "add judgments or raise aggregate.test_share"
        )
    return counts


class Sampler:
    """Candidates for the queries of one part; holds the catalogue and its index."""

    def __init__(self, recipe: Recipe, store: Store, shares: dict[str, float]):
        self.cfg, self.seed, self.store, self.shares = recipe.sample, recipe.seed, store, shares
        rows = store.read("documents").to_pylist()
        self.texts = {row["doc_id"]: row for row in rows}
        self.doc_ids = sorted(self.texts)
        self.bm25 = BM25.of([self.texts[doc_id] for doc_id in self.doc_ids])

    def __call__(self, part: int) -> dict[str, int]:
        queries = self.store.read("queries", part=part).to_pylist()
        evidence = _by_query(self.store.read("evidence", part=part).to_pylist())
        asked = pc.field("query").isin(pa.array([row["query"] for row in queries], pa.string()))
        grades = _by_query(self.store.read("judgments", where=asked).to_pylist())
        queries = [row for row in queries if self.taken(row, row["query"] in grades)]
        groups = [self.group(row, evidence.get(row["query"], []), grades.get(row["query"], [])) for row in queries]
        kept = [group for group in groups if len(group["docs"]) > 1]
        clicked = [example for row in queries for example in self.clicked(row, evidence.get(row["query"], []))]
        self.store.write("groups", part, kept)
        self.store.write("clicked", part, clicked)
        splits = {split: sum(group["split"] == split for group in kept) for split in ("train", "validation", "test")}
        return splits | {
            "pairs": sum(len(group["docs"]) for group in kept),
            "asked": sum(doc["asked"] for group in kept for doc in group["docs"]),
            **{band: sum(group["band"] == band for group in kept) for band in BANDS},
            "clicked": len(clicked),
            "without_list": len(groups) - len(kept),
        }

    def taken(self, query: Row, graded: bool) -> bool:
        return graded or sampling.uniform(f"taken\t{query['query']}", self.seed) < self.shares[query["band"]]

    def group(self, query: Row, evidence: list[Row], judgments: list[Row]) -> Row:
        """A test list holds the graded documents alone: what is measured on it is the order of those."""
        grades = {row["doc_id"]: row["grade"] for row in judgments}
        if query["split"] == "test":
            chosen = [(doc_id, "judged") for doc_id in sorted(grades)]
        else:
            ranked = self.bm25.top(query["query"], self.cfg.judged + len(evidence) + self.cfg.bm25)
            chosen = sampling.candidates(query["query"], grades, evidence, ranked, self.doc_ids, self.cfg, self.seed)
        group = sampling.group(query, chosen, self.texts, evidence, grades)
        if query["split"] != "test" and self.cfg.asked_share < 1:
            scores = self.bm25.scores(query["query"], [doc["doc_id"] for doc in group["docs"]])
            for doc, asked in zip(group["docs"], sampling.ends(scores, self.cfg.asked_share), strict=True):
                doc["asked"] = asked
        return group

    def clicked(self, query: Row, evidence: list[Row]) -> list[Row]:
        """Pre-training examples; a test query gives none."""
        if query["split"] == "test":
            return []
        return [
            {name: query[name] for name in ("query", "split", "band")}
            | {name: self.texts[row["doc_id"]][name] for name in ("title", "summary")}
            | {"attractiveness": row["attractiveness"], "satisfied_share": row["satisfied"] / row["clicks"]}
            for row in evidence
            if row["clicks"] >= self.cfg.min_clicks and row["doc_id"] in self.texts
        ]


def _ungraded(store: Store) -> Counter[str]:
    """How many training queries of each band nobody graded."""
    graded = pl.from_arrow(store.read("judgments", ["query"]))
    queries = pl.from_arrow(store.read("queries", ["query", "band", "split"]))
    left = pl.DataFrame(queries).filter(pl.col("split") != "test").join(pl.DataFrame(graded), on="query", how="anti")
    return Counter(left["band"].to_list())


def _by_query(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["query"], []).append(row)
    return found


if __name__ == "__main__":
    sys.exit(launch.main("sample"))
