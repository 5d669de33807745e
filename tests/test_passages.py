import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import passages
from disranker.recipe import Refused

TEXTS = ["It rains [today].", "größe 42", "the end"]
ROWS = [{"text": text, "source": n} for n, text in enumerate(TEXTS)]
CONTENT = {
    "a.txt": "".join(f"{text}\n" for text in TEXTS).encode(),
    "a.md": f"\ufeff{TEXTS[0]}\r\n\r\n  {TEXTS[1]} \n \n{TEXTS[2]}".encode(),
    "a.jsonl": b"\n" + "\n\n".join(map(json.dumps, ROWS)).encode(),
    "a.json": json.dumps(ROWS).encode(),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: bytes(pa.compress(content, "zstd"))}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", CONTENT)
def test_the_same_3_passages_come_out_of_lines_and_of_json_packed_or_not(tmp_path, name, packed):
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKED[packed](CONTENT[name]))
    assert list(passages.texts(str(path))) == TEXTS


def test_the_same_3_passages_come_out_of_parquet_and_null_is_none(tmp_path):
    pq.write_table(pa.Table.from_pylist([*ROWS, {"text": None}]), tmp_path / "a.parquet")
    assert list(passages.texts(str(tmp_path / "a.parquet"))) == TEXTS


def test_of_7_lines_of_json_those_2_that_hold_text_are_passages(tmp_path):
    lines = ['{"text": "one"}', '{"text": ', "[1]", '{"title": "x"}', '{"text": 3}', '{"text": " "}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert list(passages.texts(str(tmp_path / "a.jsonl"))) == ["one", "two"]


def test_a_byte_that_is_no_utf8_spoils_itself_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir\n")
    assert list(passages.texts(str(tmp_path / "a.txt"))) == ["caf\ufffd noir"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_without_text_are_refused_with_the_columns_that_they_have(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"body": "rain", "url": "u"}\n{"text": "rain"}')
    if name == "a.parquet":
        pq.write_table(pa.table({"body": ["rain"], "url": ["u"]}), path)
    with pytest.raises(Refused, match=rf"^pretrain\.general: .*{name}: no column text; it has body, url$"):
        list(passages.texts(str(path)))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet"])
def test_a_file_that_ends_too_early_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"rain " * 1000)[:-9])
    with pytest.raises(Refused, match=rf"{name} cannot be read to its end"):
        list(passages.texts(str(tmp_path / name)))


class Letters:
    """Ids are letters, in pieces of at most 4; counts what it was asked."""

    def __init__(self):
        self.asked = 0

    def passages(self, texts):
        self.asked += len(texts)
        return [[list(map(ord, text[at : at + 4])) for at in range(0, len(text), 4)] for text in texts]


def drawn(texts, seed):
    """Pieces of all passages in the order of their draws."""
    order = np.argsort(np.random.default_rng(seed).random(len(texts)))
    return [piece for place in order for piece in Letters().passages([texts[place]])[0]]


words = st.lists(st.text("abc", max_size=11), max_size=40)


@settings(deadline=None)
@given(words, st.integers(0, 150), st.integers(0, 5), st.integers(1, 9))
def test_the_first_drawn_pieces_that_make_up_the_number_are_taken_however_many_are_read_together(
    texts, most, seed, together
):
    before, passages.TOGETHER = passages.TOGETHER, together
    try:
        found = passages.taken(iter(texts), Letters(), most, seed)
    finally:
        passages.TOGETHER = before
    assert found == drawn(texts, seed)[: len(found)]
    ids = sum(map(len, found))
    if ids < most:
        assert len(found) == len(drawn(texts, seed))
    else:
        assert ids - sum(map(len, found[-1:])) < most or not most


@pytest.mark.parametrize(("most", "pieces"), [(0, 0), (1, 1), (4, 1), (5, 2), (10, 3), (99, 3)])
def test_of_a_passage_of_10_ids_in_pieces_of_4_no_more_pieces_are_taken_than_are_wanted(most, pieces):
    assert len(passages.taken(["abcdefghij"], Letters(), most, 1)) == pieces


def test_another_seed_takes_others_and_the_same_one_the_same():
    texts = [f"{n:04d}" for n in range(100)]
    found = [passages.taken(texts, Letters(), 40, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and len(found[0]) == 10


def test_of_20000_passages_of_which_10_are_taken_few_are_tokenised(monkeypatch):
    monkeypatch.setattr(passages, "TOGETHER", 10)
    tokens = Letters()
    passages.taken((f"{n:04d}" for n in range(20_000)), tokens, 40, seed=3)
    assert tokens.asked < 200  # 10 * (1 + ln(20000 / 10)) = 86 on average, and 10 at a time before the limit falls
