import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import labels, store
from disranker.contract import Contract
from disranker.labels import Labels
from disranker.recipe import Refused
from disranker.store import Store

LIMITS = {"max_query_tokens": 4, "max_title_tokens": 4, "max_tokens": 16}
CONTRACT = Contract(form="decoder", tokenizer="t", pad=0, open=1, close=2, pooling="last", **LIMITS)
KEYS = [labels.key([n], "teacher") for n in range(40)]
ids = st.lists(st.integers(0, 2**31), max_size=8)


@pytest.fixture
def at(tmp_path):
    return Labels(Store(str(tmp_path)), "t1")


def names(at):
    return sorted(path.name for path in Path(at.store.at("labels", at.teacher)).iterdir())


@settings(deadline=None)
@given(ids, ids)
def test_a_key_is_32_characters_that_the_ids_decide(one, other):
    assert (labels.key(one, "t") == labels.key(other, "t")) is (one == other)
    assert len(labels.key(one, "t")) == 32 and set(labels.key(one, "t")) <= set(labels.PARTITIONS)
    assert labels.key(one, "t") != labels.key(one, "u")


def test_a_key_stays_what_it_was():
    assert labels.key([1, 2, 300], "teacher") == "eaa2bb45c432f68bb2f053f46736ed9d"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_text("not part of it")
    return folder


def test_a_teacher_is_named_by_weights_config_contract_dtype_and_engine(model):
    def name(contract=CONTRACT, dtype="float32", engine="1"):
        return labels.teacher(labels.about(model, contract, dtype, engine))

    first = name()
    longer = CONTRACT.model_copy(update={"max_tokens": 17})
    others = [name(longer), name(dtype="bfloat16"), name(engine="2")]
    (model / "optimizer.pt").write_text("changed")
    assert name() == first
    for file, content in (("model.safetensors", b"weightz"), ("config.json", b"{ }"), ("more.safetensors", b"x")):
        (model / file).write_bytes(content)
        others.append(name())
    assert len({first, *others}) == 7


def test_missing_names_each_unknown_key_once_in_order(at):
    at.write(KEYS[2:4], [0.0, 1.0])
    assert at.missing([KEYS[5], KEYS[2], KEYS[4], KEYS[5], KEYS[3], KEYS[4]]) == [KEYS[5], KEYS[4]]
    at.merge()
    assert at.missing([KEYS[5], KEYS[2]]) == [KEYS[5]] and at.missing([]) == []


def test_a_batch_written_twice_is_there_once_whatever_its_order(at):
    at.write(KEYS[:3], [1.0, 2.0, 3.0])
    at.write(KEYS[2::-1], [3.0, 2.0, 1.0])
    assert len(names(at)) == 1 and at.scores(KEYS) == dict(zip(KEYS[:3], [1.0, 2.0, 3.0], strict=True))
    assert at.written(KEYS[2::-1]) and not at.written(KEYS[:2])


def test_merging_keeps_every_value_and_leaves_one_file_a_partition(at):
    wanted = {key: float(n) for n, key in enumerate(KEYS)}
    for batch in (KEYS[n : n + 7] for n in range(0, 40, 7)):
        at.write(batch, [wanted[key] for key in batch])
    before = at.scores(KEYS)
    at.merge()
    assert before == at.scores(KEYS) == wanted
    merged = names(at)
    assert [name[: len("part-0-")] for name in merged] == sorted({f"part-{key[0]}-" for key in KEYS})
    assert at.fresh() == []
    at.merge()
    assert at.scores(KEYS) == wanted and names(at) == merged


def test_a_second_merge_adds_to_the_partitions_and_scores_come_from_both_kinds_of_file(at):
    at.write(KEYS[:20], [1.0] * 20)
    at.merge()
    at.write(KEYS[15:30], [1.0] * 15)
    assert at.scores(KEYS) == dict.fromkeys(KEYS[:30], 1.0) and at.missing(KEYS) == KEYS[30:]
    at.merge()
    assert at.scores(KEYS) == dict.fromkeys(KEYS[:30], 1.0) and at.measure()["count"] == 30


def test_only_those_keys_that_were_asked_for_come_back(at):
    at.write(KEYS, [0.5] * 40)
    at.merge()
    assert at.scores([KEYS[7], KEYS[7], "f" * 32]) == {KEYS[7]: 0.5} and at.scores([]) == {}


class PartOfThem:
    """Partitions under which a process dies at the 9th."""

    def __iter__(self):
        yield from "01234567"
        raise KeyboardInterrupt


def test_a_merge_that_died_half_way_loses_and_doubles_nothing(at, monkeypatch):
    at.write(KEYS[:9], [2.0] * 9)
    with monkeypatch.context() as patched:
        patched.setattr(labels, "PARTITIONS", PartOfThem())
        with pytest.raises(KeyboardInterrupt):
            at.merge()
    assert {name.partition("-")[0] for name in names(at)} == {"new", "part"}
    assert at.scores(KEYS) == dict.fromkeys(KEYS[:9], 2.0)
    at.merge()
    assert at.measure()["count"] == 9 and at.fresh() == []


def test_two_merges_at_once_lose_and_double_nothing(at, monkeypatch):
    """The second runs whole in the middle of the first: after it has read its files, before it writes."""
    other = Labels(at.store, at.teacher)
    at.write(KEYS[:20], [1.0] * 20)
    at.merge()
    at.write(KEYS[20:30], [2.0] * 10)
    read = Labels._labels

    def interrupted(self, start, names):
        rows = read(self, start, names)
        if start == "5" and not done:
            done.append(other.write(KEYS[30:], [3.0] * 10))
            other.merge()
        return rows

    done = []
    monkeypatch.setattr(Labels, "_labels", interrupted)
    at.merge()
    assert done and sorted(at.scores(KEYS).values()) == [1.0] * 20 + [2.0] * 10 + [3.0] * 10
    at.merge()
    assert at.measure()["count"] == 40 and len(names(at)) == len({key[0] for key in KEYS}) + 1  # and stats.json


def test_a_reader_whose_file_was_compacted_away_reads_again(at, monkeypatch):
    at.write(KEYS[:20], [1.0] * 20)
    listed = Labels._files

    def stale(self, start):
        found = listed(self, start)
        if at.fresh():
            at.merge()
        return found

    monkeypatch.setattr(Labels, "_files", stale)
    assert at.missing(KEYS) == KEYS[20:]


def test_of_two_scores_for_one_key_all_readers_take_the_same(at):
    at.write(KEYS[:3], [1.0, 2.0, 3.5])
    at.write(KEYS[1:3], [2.5, 3.0])
    before = at.scores(KEYS)
    at.merge()
    assert before == at.scores(KEYS) == dict(zip(KEYS[:3], [1.0, 2.0, 3.0], strict=True))
    assert at.measure()["count"] == 3


@settings(deadline=None, max_examples=12)
@given(st.lists(st.one_of(st.none(), st.sets(st.integers(0, 39), min_size=1)), max_size=8))
def test_any_order_of_batches_and_merges_keeps_each_key_once(tmp_path_factory, happened):
    at, wanted = Labels(Store(str(tmp_path_factory.mktemp("labels"))), "t"), set()
    for event in happened:
        if event is None:
            at.merge()
        else:
            at.write([KEYS[n] for n in event], [float(n) for n in event])
            wanted |= event
        assert at.scores(KEYS) == {KEYS[n]: float(n) for n in wanted}
        assert at.missing(KEYS) == [key for n, key in enumerate(KEYS) if n not in wanted]
    at.merge()
    assert not wanted or at.measure()["count"] == len(wanted)


def test_a_store_of_a_newer_format_is_refused_and_left_alone(at):
    at.describe({"dtype": "float32"})
    again = Labels(at.store, at.teacher)
    again.describe({"dtype": "float16"})
    about = Path(at.store.at("labels", "t1", "teacher.json"))
    assert json.loads(about.read_text()) == {"dtype": "float32", "format": labels.FORMAT}
    about.write_text(json.dumps({"format": labels.FORMAT + 1}))
    with pytest.raises(Refused, match=f"format {labels.FORMAT + 1}, this version reads format {labels.FORMAT}"):
        Labels(at.store, at.teacher)


def test_an_attempt_that_never_ended_is_known_to_the_next(at):
    first = at.begin(KEYS[:3])
    second = at.begin(KEYS[2::-1])
    assert len(first) == 1 and second[:1] == first and len(at.begin(KEYS[:2])) == 1
    at.drop(second)
    assert len(at.begin(KEYS[:3])) == 1


def test_what_killed_runs_left_goes_after_a_day_and_labels_stay(at):
    at.write(KEYS[:3], [0.0] * 3)
    folder = Path(at.store.at("labels", "t1"))
    at.begin(KEYS[:3])
    (folder / "new-1.parquet.abc.unfinished").write_bytes(b"PAR1")
    at.sweep()
    assert len(names(at)) == 3
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    at.sweep()
    assert names(at) == at.fresh() and len(names(at)) == 1


def test_rejects_are_kept_as_lines_with_their_reason(at):
    pair = {"key": KEYS[0], "query": "schuh ü", "doc_id": "d", "reason": "ValueError: no"}
    at.reject([pair])
    at.reject([pair])
    (name,) = names(at)
    assert name.startswith("rejects-") and name.endswith(".jsonl")
    assert json.loads(Path(at.store.at("labels", "t1", name)).read_text()) == pair


def test_a_full_disk_leaves_no_half_file_and_what_was_there(at, monkeypatch):
    at.write(KEYS[:3], [1.0] * 3)

    def full(rows, out):
        out.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        at.write(KEYS[3:6], [1.0] * 3)
    monkeypatch.undo()
    assert len(names(at)) == 1 and at.scores(KEYS) == dict.fromkeys(KEYS[:3], 1.0)


class Engine:
    """Fails on some numbers, and counts the calls."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def __call__(self, pairs):
        self.calls += 1
        if self.bad & set(pairs):
            raise RuntimeError("no")
        return [float(pair) for pair in pairs]


@given(st.lists(st.integers(0, 30), min_size=1, unique=True), st.sets(st.integers(0, 30)))
def test_just_the_pairs_that_fail_are_isolated_and_the_others_keep_their_scores(pairs, bad):
    found = labels.isolate(pairs, Engine(bad))
    assert found == [(None, "RuntimeError: no") if pair in bad else (float(pair), "") for pair in pairs]


def test_one_bad_pair_of_512_costs_18_calls_more():
    engine = Engine({77})
    assert sum(score is None for score, _ in labels.isolate(range(512), engine)) == 1
    assert engine.calls == 1 + 2 * 9


def test_a_score_that_is_no_number_is_a_failure_of_its_pair_alone():
    found = labels.isolate([1, 2], lambda pairs: [float("nan") if pair == 2 else 0.5 for pair in pairs])
    assert found == [(0.5, ""), (None, "the score is nan")]


def test_a_pair_that_caught_its_neighbours_nan_is_scored_alone():
    found = labels.isolate([1, 2, 3], lambda pairs: [float("nan") if 2 in pairs else float(pair) for pair in pairs])
    assert found == [(1.0, ""), (None, "the score is nan"), (3.0, "")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_an_error_and_nothing_is_written(at, bad):
    with pytest.raises(ValueError, match=f"1 scores are not finite, the first for key {KEYS[1]}"):
        at.write(KEYS[:2], [0.0, bad])
    assert at.scores(KEYS) == {}


def test_3_keys_for_2_scores_are_an_error(at):
    with pytest.raises(ValueError):
        at.write(KEYS[:3], [0.0, 1.0])


def test_statistics_by_hand(at):
    at.write(KEYS[:2], [1.0, 2.0])
    at.write(KEYS[2:4], [2.0, 7.0])
    at.merge()
    found = at.measure()
    assert found == at.stats()
    histogram = found.pop("histogram")
    assert found == {"count": 4, "mean": 3.0, "deviation": pytest.approx((4 + 1 + 1 + 16) ** 0.5 / 2)}
    assert histogram["edges"] == pytest.approx([1 + 0.3 * n for n in range(21)])
    assert histogram["counts"] == [1, 0, 0, 2] + [0] * 15 + [1]


def test_without_labels_there_are_no_statistics(at):
    with pytest.raises(ValueError, match="no label to measure"):
        at.measure()
    with pytest.raises(FileNotFoundError, match=r"no statistics in .*labels/t1"):
        at.stats()


def test_a_torn_file_is_not_read(at):
    at.write(KEYS[:2], [1.0, 2.0])
    for name in ("new-1.parquet.a.unfinished", "part-0-1.parquet.b.unfinished"):
        Path(at.store.at("labels", "t1", name)).write_bytes(b"PAR1")
    assert len(at.scores(KEYS)) == 2
    at.merge()
    assert len(at.scores(KEYS)) == 2 and at.measure()["count"] == 2


def test_two_teachers_do_not_see_each_other(at):
    at.write(KEYS[:2], [1.0, 2.0])
    assert Labels(at.store, "t2").missing(KEYS[:2]) == KEYS[:2]
