"""The actor around vLLM, with a real engine: what it scores, refuses, and does after a death."""

import json

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from builders import doc, save_decoder

from disranker import labels, teacher
from disranker.contract import Tokens
from disranker.recipe import Score
from disranker.store import Store
from jobs import score, scorer
from jobs.launch import Failed

CFG = Score(actors=2, pairs_per_batch=8)  # of two, each leaves the cores to the other
DOCS = [
    doc(f"d{n}", title=title, summary=summary)
    for n, (title, summary) in enumerate(
        [("red shoe", ""), ("", ""), ("blue shoe", "warm"), ("rain jacket", "red"), ("red", "shoe"), ("ü", "[SEP]")]
    )
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    (folder := tmp_path_factory.mktemp("run") / "teacher").mkdir()
    save_decoder(folder)
    scoring = teacher.scorer(str(folder), Tokens.load(folder), seed=0)
    torch.nn.init.normal_(scoring.score.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    scoring.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model, ray_here):
    """A real engine in an actor, and what its methods say; `calls` are the sizes of the batches it was given."""

    class Counting(scorer.Scorer):
        def __init__(self, store, teacher, cfg):
            super().__init__(store, teacher, cfg)
            classify = self.engine.classify

            def counted(given, **kwargs):
                self.calls.append(len(given))
                return classify(given, **kwargs)

            self.engine.classify = counted

        def on(self, root):
            self.labels, self.calls, self.cached = labels.Labels(Store(root), "t"), [], 0

        def called(self):
            calls, self.calls = self.calls, []
            return calls

    actor = ray.remote(num_cpus=1)(Counting).remote(Store(str(model.parent)), "t", CFG)
    yield actor
    ray.kill(actor)


@pytest.fixture
def at(engine, tmp_path):
    """A store of its own for the engine."""
    ray.get(engine.on.remote(str(tmp_path)))
    return labels.Labels(Store(str(tmp_path)), "t")


@pytest.fixture
def rows(model):
    listed = Tokens.load(model).listed("red shoe", DOCS)
    return [
        {"key": labels.key(ids, "t"), "ids": ids, "prompt": prompt, "query": "red shoe", "doc_id": d["doc_id"]}
        for d, (ids, prompt) in zip(DOCS, listed, strict=True)
    ]


def label(engine, at, rows):
    rejected = ray.get(engine.label.remote(rows))
    assert not at._names("trying-", "")
    return rejected, at.scores(row["key"] for row in rows), ray.get(engine.called.remote())


def test_a_batch_is_in_the_store_when_it_is_done_and_says_what_it_took(engine, at, rows):
    batch = pa.Table.from_pylist(rows, schema=scorer.SCHEMA)
    said = ray.get(engine.__call__.remote(batch)).to_pylist()[0]
    assert (said["pairs"], said["tokens"]) == (6, sum(len(row["ids"]) for row in rows))
    assert said["rejected"] == "[]" and 0 < said["ended"] - said["began"] < 60 and said["start_s"] > 0
    found = at.scores(row["key"] for row in rows)
    assert len(found) == 6 and np.std(list(found.values())) > 0.1


def test_a_batch_that_ray_repeats_is_not_paid_for_again(engine, at, rows):
    assert label(engine, at, rows)[2] == [6]
    rejected, _, calls = label(engine, at, rows[::-1])
    assert rejected == calls == []


def test_a_pair_that_the_engine_refuses_is_found_by_halving_and_the_rest_keeps_its_scores(engine, at, rows):
    _, alone, _ = label(engine, at, [row for row in rows if row is not rows[3]])
    at.drop(at.fresh())
    poisoned = [*rows[:3], rows[3] | {"ids": [3, 10**6, 2]}, *rows[4:]]
    rejected, found, calls = label(engine, at, poisoned)
    assert [(pair["key"], pair["doc_id"]) for pair in rejected] == [(rows[3]["key"], "d3")]
    assert "Token id 1000000 is out of vocabulary" in rejected[0]["reason"]
    assert found == pytest.approx(alone, abs=1e-5) and calls == [6, 3, 3, 1, 2]


def test_a_batch_on_which_an_engine_died_is_taken_in_halves(engine, at, rows):
    _, whole, _ = label(engine, at, rows)
    at.drop(at.fresh())
    at.begin(row["key"] for row in rows)
    rejected, found, calls = label(engine, at, rows)
    assert not rejected and found == pytest.approx(whole, abs=1e-5) and calls == [3, 3]


def test_a_pair_on_which_two_engines_died_alone_is_the_culprit(engine, at, rows):
    for died in (rows, rows[:3], rows[:1], rows[:1]):
        at.begin(row["key"] for row in died)
    rejected, found, calls = label(engine, at, rows)
    assert [pair["reason"] for pair in rejected] == ["the engine died on it, 2 times"]
    assert rejected[0]["key"] == rows[0]["key"] and len(found) == 5 and calls == [2, 3]


def test_one_death_on_a_pair_alone_may_be_chance(engine, at, rows):
    at.begin([rows[0]["key"]])
    rejected, found, _ = label(engine, at, rows[:1])
    assert not rejected and len(found) == 1


def test_an_engine_that_broke_on_the_way_ends_its_process(rows, tmp_path, monkeypatch):
    class Broken:
        llm_engine = type("", (), {"has_unfinished_requests": lambda self: True})()

        def classify(self, *args, **kwargs):
            raise RuntimeError("step failed")

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    actor = scorer.Scorer.__new__(scorer.Scorer)
    actor.labels, actor.segments, actor.engine = labels.Labels(Store(str(tmp_path)), "t"), False, Broken()
    monkeypatch.setattr(scorer.os, "_exit", end)
    with pytest.raises(Ended):
        actor.label(rows)
    assert len(actor.labels._names("trying-", "")) == 1  # the next engine takes the batch in halves


def said(pairs, tokens=100, cached=0, began=10.0, ended=12.0, rejected=0):
    pair = {"key": "k", "reason": "ValueError: no"}
    times = {"start_s": 20.0, "began": began, "ended": ended}
    return {
        "pairs": pairs,
        "tokens": tokens,
        "cached_tokens": cached,
        "rejected": json.dumps([pair] * rejected),
    } | times


def test_progress_counts_from_the_first_batch_and_says_when_it_ends(capsys):
    progress = score.Progress(100, 1)
    progress.add(said(20, tokens=400, cached=100, began=10, ended=12))
    progress.add(said(30, tokens=600, cached=400, began=11, ended=15))
    assert str(progress) == "10 pairs/s, 200 tokens/s, 50% of them from the prefix cache"
    assert progress.scoring_s == 5 and progress.start_s == 20
    progress.add(said(50, tokens=1000, cached=0, began=15, ended=20))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "score: 20/100 pairs" in lines[0] and "ends in 0:00:08 at " in lines[0]
    assert "score: 100/100 pairs, 10 pairs/s, 200 tokens/s, 25% of them" in lines[1]


def test_one_reject_more_than_the_share_allows_fails_the_stage():
    progress = score.Progress(1000, 2)
    progress.add(said(500, rejected=2))
    with pytest.raises(
        Failed, match=r"3 of 600 pairs failed, more than score.max_bad_share allows; the last: ValueErr"
    ):
        progress.add(said(100, rejected=1))
    assert len(progress.rejected) == 3


def test_several_devices_ask_for_a_placement_group_and_one_for_its_own():
    assert scorer.resources(Score(gpus_per_actor=1), []) == {"num_cpus": 1, "num_gpus": 1}
    assert scorer.resources(Score(), []) == {"num_cpus": 1, "num_gpus": None}
    together = scorer.resources(Score(tensor_parallel=2, gpus_per_actor=1), [])
    assert together["num_cpus"] == 0 and callable(together["ray_remote_args_fn"])


def test_one_engine_takes_all_cores_and_several_take_what_they_asked_for(monkeypatch):
    monkeypatch.setattr(scorer.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert scorer._threads(Score()) == {"VLLM_CPU_OMP_THREADS_BIND": "0-7", "OMP_NUM_THREADS": "8"}
    shared = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "3"}
    assert scorer._threads(Score(actors=2, cpus_per_actor=3)) == shared
    assert scorer._threads(Score(max_actors=2, cpus_per_actor=3)) == shared
    alone = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    assert scorer._threads(Score(actors=2, cpus_per_actor=0.5)) == alone
    assert scorer._threads(Score(gpus_per_actor=1)) == {}


@pytest.mark.parametrize(
    ("cpus", "gpus", "cfg", "engines"),
    [
        (2, 0, Score(), 1),
        (2, 0, Score(cpus_per_actor=0.5), 2),
        (2, 0, Score(cpus_per_actor=0.1), 10),  # 1 // 0.1 is 9
        (1, 0, Score(), 0),
        (16, 4, Score(gpus_per_actor=1), 4),
        (16, 4, Score(gpus_per_actor=1, tensor_parallel=2), 2),
        (3, 4, Score(gpus_per_actor=1), 2),
    ],
)
def test_one_cpu_is_kept_for_reading_and_engines_share_the_rest(cpus, gpus, cfg, engines):
    assert score._room(cfg, {"CPU": cpus, "GPU": gpus}.get) == engines
