from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import labels
from disranker.contract import Contract
from disranker.labels import Labels
from disranker.store import Store

CONTRACT = Contract(
    form="decoder", tokenizer="t", pad=0, open=1, close=2, max_query_tokens=4, max_title_tokens=4, max_tokens=16
)
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
        return labels.teacher(model, contract, dtype, engine)

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
    assert at.missing([KEYS[5], KEYS[2], KEYS[4], KEYS[5], KEYS[3], KEYS[4]]) == [0, 2]
    assert at.missing([]) == [] and at.known(KEYS[:4]) == set(KEYS[2:4])


def test_a_batch_written_twice_is_there_once_whatever_its_order(at):
    at.write(KEYS[:3], [1.0, 2.0, 3.0])
    at.write(KEYS[2::-1], [3.0, 2.0, 1.0])
    assert len(names(at)) == 1 and at.scores(KEYS) == dict(zip(KEYS[:3], [1.0, 2.0, 3.0], strict=True))


def test_merging_keeps_every_value_and_leaves_only_partitions(at):
    wanted = {key: float(n) for n, key in enumerate(KEYS)}
    for batch in (KEYS[n : n + 7] for n in range(0, 40, 7)):
        at.write(batch, [wanted[key] for key in batch])
    before = at.scores(KEYS)
    at.merge()
    assert before == at.scores(KEYS) == wanted
    assert names(at) == sorted({f"part-{key[0]}.parquet" for key in KEYS})
    at.merge()
    assert at.scores(KEYS) == wanted


def test_a_second_merge_adds_to_the_partitions_and_scores_come_from_both_kinds_of_file(at):
    at.write(KEYS[:20], [1.0] * 20)
    at.merge()
    at.write(KEYS[15:30], [1.0] * 15)
    assert at.scores(KEYS) == dict.fromkeys(KEYS[:30], 1.0) and at.missing(KEYS) == list(range(30, 40))
    at.merge()
    assert at.scores(KEYS) == dict.fromkeys(KEYS[:30], 1.0) and at.stats()["count"] == 30


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
    assert at.stats()["count"] == 9 and not any(name.startswith("new-") for name in names(at))


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
    assert at.stats() == {"count": 4, "mean": 3.0, "deviation": pytest.approx((4 + 1 + 1 + 16) ** 0.5 / 2)}


def test_a_torn_file_is_not_read(at):
    at.write(KEYS[:2], [1.0, 2.0])
    for name in ("new-1.parquet.unfinished", "part-0.parquet.unfinished"):
        Path(at.store.at("labels", "t1", name)).write_bytes(b"PAR1")
    assert len(at.scores(KEYS)) == 2
    at.merge()
    assert len(at.scores(KEYS)) == 2 and at.stats()["count"] == 2


def test_two_teachers_do_not_see_each_other(at):
    at.write(KEYS[:2], [1.0, 2.0])
    assert Labels(at.store, "t2").missing(KEYS[:2]) == [0, 1]
