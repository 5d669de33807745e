import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import tables
from disranker.recipe import Refused

ROW = {"query": "q", "doc_id": "d", "model": "m", "score": 0.5}


@pytest.mark.parametrize(
    "rows",
    [
        [{"more": 1, "score": 0.5} | ROW],
        pa.table(
            {"more": [1], "score": pa.array([0.5], pa.float64()), "model": pa.array(["m"], pa.large_string())}
            | {"query": ["q"], "doc_id": ["d"]}
        ),
    ],
)
def test_rows_of_2_kinds_become_one_table_of_4_columns(rows):
    found = tables.conform("scores", rows)
    assert found.schema.equals(tables.SCHEMAS["scores"]) and found.to_pylist() == [ROW]


def test_a_grade_of_300_does_not_fit_its_column():
    with pytest.raises(pa.ArrowInvalid):
        tables.conform("judgments", pa.table({"query": ["a"], "doc_id": ["d"], "grade": [300], "split": ["train"]}))


def test_2_missing_columns_are_refused_beside_the_1_there_is():
    with pytest.raises(Refused, match=r"x\.parquet: no column title, summary; it has doc_id"):
        tables.require(["doc_id", "title", "summary"], ["doc_id"], "x.parquet")
    with pytest.raises(Refused, match="it has none"):
        tables.require(["doc_id"], [], "x")


def test_columns_in_another_order_and_more_of_them_are_enough():
    tables.require(["a", "b"], iter(["c", "b", "a"]), "x")


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]))), st.integers(1, 50))
def test_a_part_depends_on_the_key_alone(keys, parts):
    found = tables.part_of(keys, parts)
    assert all(0 <= part < parts for part in found)
    assert [tables.part_of([key], parts)[0] for key in keys] == found.tolist()


def test_10000_keys_fall_into_8_parts_of_about_1250():
    counts = np.bincount(tables.part_of((f"q{n}" for n in range(10_000)), 8), minlength=8)
    assert counts.min() > 1100 and counts.max() < 1400


def test_parts_are_the_same_in_another_process():
    code = "from disranker import tables; print(tables.part_of(['a', 'b', 'ü'], 1000).tolist())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(tables.part_of(["a", "b", "ü"], 1000).tolist())
