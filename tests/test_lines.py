import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import lines
from disranker.recipe import Refused

ENTRIES = [{"n": n, "text": "a\nb [c] é"} for n in range(3)]
NDJSON = b"".join(json.dumps(entry).encode() + b"\n" for entry in ENTRIES)
ARRAY = json.dumps(ENTRIES, indent=1).encode()
BULK = b"".join(b'{"index": {"_id": "%d"}}\n' % n + line + b"\n" for n, line in enumerate(NDJSON.splitlines()))


def read(path):
    """(number, entry) of all lines of a file."""
    return [
        (number, json.loads(line)) for block in lines.blocks(str(path)) for number, line in zip(*block, strict=True)
    ]


@pytest.mark.parametrize("compress", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("content", "numbers"), [(NDJSON, [1, 2, 3]), (ARRAY, [1, 2, 3]), (BULK, [2, 4, 6])], ids=["lines", "array", "bulk"]
)
def test_3_entries_come_out_of_every_form_with_their_numbers(tmp_path, content, numbers, compress):
    path = tmp_path / f"log.json{compress}"
    packed = {"": lambda: content, ".gz": lambda: gzip.compress(content), ".zst": lambda: pa.compress(content, "zstd")}
    path.write_bytes(bytes(packed[compress]()))
    assert read(path) == list(zip(numbers, ENTRIES, strict=True))


def test_3_rows_of_a_parquet_table_are_3_entries(tmp_path):
    pq.write_table(pa.Table.from_pylist(ENTRIES), tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet") == list(enumerate(ENTRIES, start=1))


def test_bulk_requests_that_create_and_have_no_blanks_are_seen_too(tmp_path):
    (tmp_path / "bulk").write_bytes(b'{"create":{}}\n{"n":1}\n{"create":{}}\n{"n":2}\n')
    assert read(tmp_path / "bulk") == [(2, {"n": 1}), (4, {"n": 2})]


@given(chunk=st.integers(1, 60), ends=st.lists(st.sampled_from([b"", b"x", b"long line", b"\r"]), max_size=8))
@settings(deadline=None)
def test_lines_do_not_hang_on_where_a_chunk_ends(tmp_path_factory, chunk, ends):
    content = b"\n".join(ends)
    path = tmp_path_factory.mktemp("lines") / "log"
    path.write_bytes(content)
    before, lines.CHUNK_BYTES = lines.CHUNK_BYTES, chunk
    try:
        found = [pair for block in lines.physical(str(path)) for pair in zip(*block, strict=True)]
    finally:
        lines.CHUNK_BYTES = before
    expected = content.split(b"\n")[: -1 if content.endswith(b"\n") or not content else None]
    assert found == list(enumerate(expected, start=1))


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_a_truncated_gzip_is_refused_in_one_line(tmp_path, cut):
    whole = gzip.compress(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "q.gz").write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(Refused, match=r"q\.gz cannot be read to its end") as caught:
        read(tmp_path / "q.gz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("cut.json", ARRAY[:-5]), ("odd.json", b"[{]"), ("no.parquet", b"PAR1"), ("none", None)]
)
def test_a_broken_array_a_broken_parquet_and_a_missing_file_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match="cannot be read"):
        read(tmp_path / name)


def test_an_empty_file_has_no_line(tmp_path):
    (tmp_path / "log").write_bytes(b"")
    assert read(tmp_path / "log") == []
