import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import psutil
import pyarrow as pa
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import lines, logs, store, ubi
from disranker.cleaning import normalise
from disranker.inputs import Ingest
from serve import records
from serve.records import Event, Writer, events, query_record

ROOT = Path(__file__).parents[1]
NOON = 1_790_856_000.5  # 2026-10-01 12:00:00.500 UTC
PROGRAM = """
import resource, sys, time
from serve.records import Writer, query_record

def record(number):
    return query_record(query_id=f"q{number:06}", client="c", query="red shoe", hits=["a"], time=time.time(),
                        application="shop", attributes={})
"""


class Clock:
    """Stands still until it is set; whoever asks while it is held waits."""

    def __init__(self):
        self.now, self.free, self.asked = NOON, threading.Event(), threading.Event()
        self.free.set()

    def __call__(self):
        self.asked.set()
        assert self.free.wait(30)
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(records, "TICK_S", 0.01)


@pytest.fixture
def in_tokyo(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def search(number=1, hits=("a", "b"), **more):
    fields = {"client": "c", "query": "red shoe", "time": NOON, "application": "shop"}
    fields |= {"attributes": {"experiment": "e", "arm": "live"}} | more
    return query_record(query_id=f"q{number}", hits=hits, **fields)


def click(number=1, doc_id="a", **more):
    fields = {"action_name": "click", "query_id": f"q{number}", "client_id": "c", "timestamp": "2026-10-01T12:00:01Z"}
    return fields | {"event_attributes": {"object": {"object_id": doc_id}}} | more


def writer(folder, kind="queries", max_bytes=1 << 20, max_age_s=60.0, clock=lambda: NOON):
    return Writer(folder, f"ubi_{kind}", max_bytes, max_age_s, clock)


def write(folder, found, kind="queries", **more):
    """All records, by a writer that comes and goes."""
    one = writer(folder, kind, **more)
    for record in found:
        one.write(record)
    one.close()
    assert (one.dropped, one.errors) == (0, 0)


def finished(folder):
    """Files that ingest finds."""
    return sorted(path for path in Path(folder).glob("*") if path.name.startswith("ubi_"))


def unfinished(folder):
    return sorted(path for path in Path(folder).glob("*") if not path.name.startswith("ubi_"))


def read(folder, *kinds):
    """(searches, rejects, counts), as `jobs.ingest` has them."""
    found = [
        ubi.table(numbers, block, path, kind)
        for kind in kinds
        for path in store.expand([f"{folder}/ubi_{kind}*"], kind)
        for numbers, block in lines.blocks(path)
    ]
    searches, rejects, counts = logs.join(pa.concat_tables(found), Ingest())
    refused = [row for table in found for row in table.to_pylist() if row["kind"] == "reject"]
    return searches.to_pylist(), refused + rejects.to_pylist(), counts


def query_ids(folder):
    return [json.loads(line)["query_id"] for path in finished(folder) for line in path.read_bytes().splitlines()]


def until(true, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def faults(sent):
    with pytest.raises(pydantic.ValidationError) as error:
        events(sent)
    return [(fault["loc"], fault["type"], fault["msg"]) for fault in error.value.errors()]


# Records


def test_an_answer_is_a_query_record_of_ubi_1_3():
    assert search(teams=["live", None], attributes={"experiment": "e", "arm": "team", "k": 0.5, "start": 10}) == {
        "application": "shop",
        "query_id": "q1",
        "client_id": "c",
        "user_query": "red shoe",
        "query_response_id": "q1",
        "query_response_hit_ids": ["a", "b"],
        "object_id_field": "doc_id",
        "query_attributes": {"experiment": "e", "arm": "team", "k": 0.5, "start": 10, "teams": ["live", None]},
        "timestamp": "2026-10-01T12:00:00.500Z",
    }


def test_without_interleaving_there_are_no_teams_and_an_answer_has_as_many_as_hits():
    assert search()["query_attributes"] == {"experiment": "e", "arm": "live"}
    with pytest.raises(ValueError, match="1 teams for 2 hits"):
        search(teams=["live"])
    with pytest.raises(ValueError, match="0 teams for 2 hits"):
        search(teams=[])


@pytest.mark.parametrize("second", [0.0, 1.001, 1_790_856_000.999, 1_790_856_000.123])
def test_a_time_has_milliseconds(second):
    said = search(time=second)["timestamp"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said)
    assert abs(datetime.fromisoformat(said).timestamp() - second) < 0.0005


# Events


def test_one_event_or_a_list_of_up_to_100_is_taken():
    (one,) = events(click())
    assert one.record() == click(timestamp="2026-10-01T12:00:01.000Z")
    assert [event.query_id for event in events([click(1), click(2)])] == ["q1", "q2"]
    assert events([]) == []
    assert len(events([click()] * 100)) == 100
    assert faults([click()] * 101)[0][:2] == ((), "too_long")


@pytest.mark.parametrize("sent", [None, 3, "click", [None], {}, {"action_name": 5}, [[click()]]])
def test_what_is_no_event_is_a_validation_error(sent):
    assert faults(sent)


def test_a_fault_says_which_event_and_which_field():
    assert faults([click(), click(action_name=None)])[0][:2] == ((1, "action_name"), "string_type")
    (fault,) = faults([click(), click(timestamp="noon")])
    assert fault[0] == (1, "timestamp") and "neither ISO 8601 nor milliseconds" in fault[2]


@pytest.mark.parametrize(
    "field",
    [
        *(lambda text, name=name: {name: text} for name in ("action_name", "query_id", "client_id", "user_query")),
        lambda text: {"message": text},
        lambda text: {"session_id": text},
        lambda text: {text: 1},
        lambda text: {"more": [1, {"x": text}]},
        lambda text: {"more": {"y": {text: 1}}},
        lambda text: {"event_attributes": {"object": {"object_id": text}}},
        lambda text: {"event_attributes": {"object": {"object_id": "a"}, "trail": ["b", text]}},
    ],
)
def test_a_text_has_1024_characters_at_most_wherever_it_stands(field):
    assert events(click(**field("\U0001f45f" * 1024)))
    (fault,) = faults(click(**field("x" * 1025)))
    assert fault[0] == (0,) and "1024 characters in a text" in fault[2]


def test_an_event_has_16_kib_at_most_as_it_is_written():
    rest = ["x" * 1000] * 15 + ["x" * 500]
    room = 16 * 1024 - len(json.dumps(click(timestamp="2026-10-01T12:00:01.000Z", more=[*rest, ""])) + "\n")
    (event,) = events(click(more=[*rest, "x" * room]))
    assert len(records._line(event.record())) == 16 * 1024
    assert "more than 16384 bytes" in faults(click(more=[*rest, "x" * (room + 1)]))[0][2]
    assert faults(click(more=[*rest, "\xe9" * room]))  # two bytes a character


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud83d", ["\udc00"], {"\ud83d": 1}, b"x", {1}])
@pytest.mark.parametrize("place", ["more", "event_attributes"])
def test_what_json_has_not_is_refused(value, place):
    given = {"object": {"object_id": "a"}, "dwell_time": value}
    assert faults(click(**{place: value if place == "more" else given}))
    assert faults(click(timestamp=value))


def test_an_event_nested_100000_deep_is_refused():
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    assert faults(click(more=deep))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (click(client_id=None), "no client_id"),
        (click(query_id=None), "neither query_id nor user_query"),
        (click(query_id="", user_query=" "), "neither query_id nor user_query"),
        (click(event_attributes=None), "no event_attributes.object.object_id"),
        (click(doc_id=""), "no event_attributes.object.object_id"),
        (click(doc_id=True), "no event_attributes.object.object_id"),
        (click(action_name=""), "no action_name"),
    ],
)
def test_what_ingest_would_refuse_is_refused_at_once_and_for_the_same_reason(sent, reason):
    assert ubi.record(json.dumps(sent).encode(), "", 0, "events")["reason"] == reason
    (fault,) = faults(sent)
    assert fault[0] == (0,) and reason in fault[2]


def test_an_event_that_is_no_click_needs_an_action_alone():
    (event,) = events({"action_name": "scroll"})
    assert set(event.record()) == {"action_name", "timestamp"}


def test_what_ubi_does_not_name_stays_and_null_does_not():
    extra = {"session_id": "s", "record": 1, "trail": ["a", None, {"b": 2.5}], "message": "m"}
    (event,) = events(click(**extra, user_query=None, page=None))
    assert event.record() == click(**extra, timestamp="2026-10-01T12:00:01.000Z")


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
def test_without_a_time_an_event_has_that_of_the_server(given, in_tokyo):
    sent = {name: value for name, value in click().items() if name != "timestamp"} | given
    before = time.time()
    (event,) = events(sent)
    assert before - 0.001 <= datetime.fromisoformat(event.timestamp).timestamp() <= time.time()
    assert event.record()["timestamp"] == event.timestamp and event.timestamp.endswith("Z")


@pytest.mark.parametrize("sent", [1_790_856_000_500, "2026-10-01T14:00:00.500+02:00", "2026-10-01 12:00:00.5"])
def test_a_time_is_written_in_one_form_however_it_came(sent):
    assert events(click(timestamp=sent))[0].timestamp == "2026-10-01T12:00:00.500Z"


def test_a_route_can_take_the_model_as_its_schema():
    assert "event_attributes" in Event.model_json_schema()["properties"]


# The loop


def test_searches_and_clicks_come_back_as_ingest_reads_them(tmp_path):
    attributes = {"experiment": "e", "arm": "candidate", "start": 10, "shuffled": True}
    write(tmp_path, [search(1), search(2, ["c", "a"], query="Blue  Hat", attributes=attributes, teams=["x", "y"])])
    sent = [click(1, "b", event_attributes={"object": {"object_id": "b"}, "position": {"ordinal": 2}, "dwell_time": 7})]
    sent += [click(2, "c"), click(2, "a", action_name="purchase"), {"action_name": "scroll"}]
    write(tmp_path, [event.record() for event in events(sent)], "events")
    searches, refused, counts = read(tmp_path, "queries", "events")
    assert refused == [] and (counts["clicks"], counts["conversions"]) == (2, 1)
    assert [(row["query_id"], row["query"], row["client"], row["shuffled"]) for row in searches] == [
        ("q1", "red shoe", "c", False),
        ("q2", "blue hat", "c", True),
    ]
    assert searches[0]["time"] == datetime.fromtimestamp(NOON, UTC)
    hits = [[tuple(hit.values()) for hit in row["hits"]] for row in searches]
    assert hits == [
        [("a", 1, False, None, False), ("b", 2, True, 7.0, False)],
        [("c", 11, True, None, False), ("a", 12, False, None, True)],
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\r\n\x85\u2028\u2029\\ud\U0001f45f\"'{["))
ids = texts.filter(bool)
pages = st.tuples(texts.filter(normalise), ids, st.lists(ids, min_size=1, max_size=4, unique=True), texts)


@settings(max_examples=60, deadline=None)
@given(st.lists(pages, min_size=1, max_size=5))
def test_any_text_survives_the_loop(found):
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number} {client}" for number, (_, client, _, _) in enumerate(found)]
        searches, clicks = [], []
        for name, (query, client, hits, text) in zip(names, found, strict=True):
            fields = {"query": query, "client": client, "attributes": {"experiment": text, "arm": text}}
            searches.append(search(hits=hits, **fields) | {"query_id": name})
            clicks += events(click(doc_id=hits[-1], query_id=name, client_id=client, message=text, more={text: text}))
        write(folder, searches)
        write(folder, [event.record() for event in clicks], "events")
        rows, refused, counts = read(folder, "queries", "events")
        assert refused == [] and counts["clicks"] == len(found)
        back = {row["query_id"]: (row["query"], row["client"], row["hits"]) for row in rows}
        assert list(map(back.__contains__, names)) == [True] * len(found) == [True] * len(rows)
        for name, (query, client, hits, _) in zip(names, found, strict=True):
            assert back[name][:2] == (normalise(query), client)
            assert [(hit["doc_id"], hit["clicked"]) for hit in back[name][2]] == [
                (hit, hit == hits[-1]) for hit in hits
            ]
        said = [json.loads(line) for path in finished(folder) for line in path.read_bytes().split(b"\n")[:-1]]
        assert sorted(map(repr, said)) == sorted(map(repr, [*searches, *(event.record() for event in clicks)]))


# Files


def test_nothing_is_written_before_the_first_record(tmp_path):
    one = writer(tmp_path / "a" / "b")
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_hidden_until_it_is_finished_and_its_name_says_when_and_where(tmp_path, in_tokyo):
    one = writer(tmp_path / "a" / "b")
    one.write(search())
    until(lambda: (tmp_path / "a" / "b").exists() and unfinished(tmp_path / "a" / "b"))
    (path,) = (tmp_path / "a" / "b").iterdir()
    one.close()
    (final,) = (tmp_path / "a" / "b").iterdir()
    where = re.escape(f"{socket.gethostname()}-{os.getpid()}")
    assert re.fullmatch(rf"ubi_queries-20261001T120000500000Z-{where}-\d+\.ndjson", final.name)
    assert path.name == f".open-{final.name}"


def test_a_record_is_on_disk_before_its_file_is_finished(tmp_path):
    one = writer(tmp_path)
    one.write(search(7))
    until(lambda: unfinished(tmp_path) and unfinished(tmp_path)[0].read_bytes() == records._line(search(7)))
    assert finished(tmp_path) == []
    one.close()


def test_a_file_ends_with_the_record_that_fills_it(tmp_path):
    size = len(records._line(search()))
    write(tmp_path, [search()] * 9, max_bytes=3 * size - 1)
    assert [path.stat().st_size for path in finished(tmp_path)] == [3 * size] * 3
    shutil.rmtree(tmp_path)
    write(tmp_path, [search()] * 9, max_bytes=3 * size + 1)
    assert sorted(path.stat().st_size for path in finished(tmp_path)) == [size, 4 * size, 4 * size]


def test_a_file_that_is_60_s_old_is_finished_though_nothing_comes(tmp_path, clock):
    one = writer(tmp_path, clock=clock)
    one.write(search(1))
    until(lambda: unfinished(tmp_path))
    clock.now = NOON + 59.9
    time.sleep(0.1)
    assert not finished(tmp_path)
    clock.now = NOON + 60
    until(lambda: finished(tmp_path) and not unfinished(tmp_path))
    clock.now = NOON + 100
    one.write(search(2))  # begins a file of its own, whose age counts from here
    until(lambda: unfinished(tmp_path))
    clock.now = NOON + 159.9
    time.sleep(0.1)
    assert len(finished(tmp_path)) == 1
    one.close()
    assert query_ids(tmp_path) == ["q1", "q2"]


def test_a_clock_that_is_set_back_ends_a_file(tmp_path, clock):
    one = writer(tmp_path, clock=clock)
    one.write(search())
    until(lambda: unfinished(tmp_path))
    clock.now = NOON - 3600
    until(lambda: finished(tmp_path))
    one.close()


def test_3_writers_of_one_folder_share_no_name(tmp_path):
    many = [writer(tmp_path, max_bytes=1) for _ in range(3)]
    for number in range(100):
        for offset, one in enumerate(many):
            one.write(search(3 * number + offset))
    for one in many:
        one.close()
    assert [one.errors for one in many] == [0, 0, 0]
    assert sorted(query_ids(tmp_path)) == sorted(f"q{number}" for number in range(300))


def test_a_file_that_is_there_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "NUMBERS", iter([0, 0, 1]))
    one, other = writer(tmp_path), writer(tmp_path)
    one.write(search(1))
    until(lambda: unfinished(tmp_path))
    other.write(search(2))
    other.write(search(3))
    other.close()
    one.close()
    assert query_ids(tmp_path) == ["q1", "q3"] and (one.errors, other.errors) == (0, 1)


def test_no_file_that_ingest_finds_is_ever_incomplete(tmp_path):
    seen, over = {}, threading.Event()

    def look():
        while not over.is_set():
            for path in finished(tmp_path):
                seen.setdefault(path, path.read_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    one = writer(tmp_path, max_bytes=5000)
    for number in count():
        one.write(search(number))
        time.sleep(0.0005)
        if len(seen) >= 5:
            break
    one.close()
    over.set()
    watcher.join()
    assert all(content == path.read_bytes() and content.endswith(b"\n") for path, content in seen.items())
    assert query_ids(tmp_path) == [f"q{number}" for number in range(number + 1)] and not unfinished(tmp_path)


def test_close_drains_what_waits_and_may_be_said_twice(tmp_path, clock):
    one = writer(tmp_path, clock=clock)
    clock.free.clear()
    for number in range(500):
        one.write(search(number))
    threading.Timer(0.05, clock.free.set).start()
    one.close()
    one.close()
    assert query_ids(tmp_path) == [f"q{number}" for number in range(500)] and not unfinished(tmp_path)
    one.write(search())
    assert one.dropped == 1


def test_what_a_slow_disk_has_no_time_for_is_dropped_and_counted_and_nobody_waits(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(records, "MAX_WAITING", 10)
    one = writer(tmp_path, clock=clock)
    clock.free.clear()
    clock.asked.clear()
    one.write(search(0))
    assert clock.asked.wait(10)  # the thread has the first, and is held
    began = time.monotonic()
    for number in range(1, 26):
        one.write(search(number))
    assert time.monotonic() - began < 1
    assert (one.dropped, one.errors) == (15, 0)
    clock.free.set()
    one.close()
    assert query_ids(tmp_path) == [f"q{number}" for number in range(11)]


# Errors


def test_a_folder_that_is_gone_is_an_error_counted_and_said_once_and_not_made_again(tmp_path, caplog):
    one = writer(tmp_path / "disk", max_bytes=1)
    one.write(search(0))
    until(lambda: (tmp_path / "disk").exists() and finished(tmp_path / "disk"))
    (tmp_path / "disk").rename(tmp_path / "unplugged")
    for number in (1, 2, 3):
        one.write(search(number, query="zebrafish"))
    until(lambda: one.errors == 3)
    assert not (tmp_path / "disk").exists()
    (tmp_path / "unplugged").rename(tmp_path / "disk")
    one.write(search(4))
    one.close()
    assert query_ids(tmp_path / "disk") == ["q0", "q4"] and (one.errors, one.dropped) == (3, 0)
    (said,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert "ubi_queries" in said and "No such file" in said and str(tmp_path) in said
    assert "zebrafish" not in caplog.text


def test_a_folder_that_cannot_be_made_is_no_fault_of_a_request(tmp_path):
    (tmp_path / "file").write_text("")
    one = writer(tmp_path / "file" / "folder")
    one.write(search(1))
    one.write(search(2))
    one.close()
    assert one.errors == 2


@pytest.mark.parametrize("broken", [float("nan"), "zebrafish \ud83d", {1}])
def test_a_record_that_is_no_json_is_lost_alone(tmp_path, caplog, broken):
    one = writer(tmp_path)
    for record in (search(1), search(2, attributes={"x": broken}), search(3)):
        one.write(record)
    one.close()
    assert one.errors == 1 and query_ids(tmp_path) == ["q1", "q3"] and len(finished(tmp_path)) == 1
    assert "zebrafish" not in caplog.text


def run(folder, rest):
    """A process that writes as `rest` says."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    command = [sys.executable, "-c", PROGRAM + rest, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_on_a_full_disk_what_was_written_in_part_is_cut_off(tmp_path):
    """A limit on the size of files, in whose last line there is room for a part alone."""
    size = len(records._line(search("000000", attributes={})))
    rest = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({3 * size + 50}, resource.RLIM_INFINITY))
one = Writer(sys.argv[1], "ubi_queries", 1 << 20, 60.0)
for number in range(10): one.write(record(number))
one.close()
print(one.errors, one.dropped)
"""
    process = run(tmp_path, rest)
    assert process.communicate(timeout=60)[0].split() == ["2", "0"]
    assert query_ids(tmp_path) == [f"q{number:06}" for number in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert not unfinished(tmp_path) and read(tmp_path, "queries")[1] == []


def test_a_disk_without_any_room_leaves_no_empty_files(tmp_path, monkeypatch):
    class Full(records.FileIO):
        def write(self, line):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "FileIO", Full)
    one = writer(tmp_path)
    for number in range(5):
        one.write(search(number))
    one.close()
    assert one.errors == 5 and list(tmp_path.iterdir()) == []


# Those who died


def left(folder, pid, content=b'{"query_id": "left"}\n', prefix="ubi_queries", host=None, age_s=0.0):
    """A file that another process had open."""
    path = folder / f".open-{prefix}-20261001T115959000000Z-{host or socket.gethostname()}-{pid}-0.ndjson"
    path.write_bytes(content)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture(scope="module")
def dead():
    """The number of a process that ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("end", [b"", b'{"query_id": "ha', b'{"query_id": "ha' + b"x" * 200_000])
def test_the_next_start_finishes_the_whole_lines_of_the_dead(tmp_path, dead, end):
    path = left(tmp_path, dead, b'{"query_id": "0"}\n{"query_id": "1"}\n' + end)
    writer(tmp_path).close()
    assert not path.exists() and query_ids(tmp_path) == ["0", "1"]
    assert [found.name for found in tmp_path.iterdir()] == [path.name.removeprefix(".open-")]


@pytest.mark.parametrize("content", [b"", b'{"query_id": "half'])
def test_a_file_of_the_dead_without_a_whole_line_goes(tmp_path, dead, content):
    left(tmp_path, dead, content)
    writer(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_living_of_other_hosts_and_of_other_kinds_stay(tmp_path, dead):
    kept = [left(tmp_path, pid) for pid in (os.getpid(), os.getppid(), 1)]
    kept += [left(tmp_path, dead, host="elsewhere"), left(tmp_path, dead, prefix="ubi_events")]
    kept += [left(tmp_path, dead, host=f"x{socket.gethostname()}")]
    writer(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_writer_leaves_what_another_of_its_process_has_open(tmp_path):
    one = writer(tmp_path)
    one.write(search())
    until(lambda: unfinished(tmp_path))
    writer(tmp_path).close()
    assert len(unfinished(tmp_path)) == 1
    one.close()
    assert query_ids(tmp_path) == ["q1"] and one.errors == 0


def test_a_process_that_has_the_number_of_a_dead_one_did_not_write_its_file(tmp_path):
    """In a container each process has the number of its predecessor."""
    age_s = time.time() - psutil.Process().create_time() + 60
    left(tmp_path, os.getpid(), age_s=age_s)
    writer(tmp_path).close()
    assert query_ids(tmp_path) == ["left"]


def test_a_process_that_ended_and_that_nobody_asked_about_is_dead(tmp_path):
    process = subprocess.Popen(["true"])
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    left(tmp_path, process.pid)
    writer(tmp_path).close()
    assert query_ids(tmp_path) == ["left"]
    process.wait()


def test_of_2_processes_that_start_at_once_the_second_minds_nothing(tmp_path, dead, monkeypatch):
    path = left(tmp_path, dead)
    monkeypatch.setattr(records, "_finish", lambda path: (path.unlink(), path.read_bytes()))
    one = writer(tmp_path)
    one.close()
    assert one.errors == 0 and not path.exists()


@pytest.mark.slow
def test_a_process_that_never_closes_its_writer_ends_and_the_next_start_finishes_its_file(tmp_path):
    rest = """
one = Writer(sys.argv[1], "ubi_queries", 1 << 20, 60.0)
one.write(record(1))
time.sleep(0.5)
"""
    assert run(tmp_path, rest).wait(timeout=30) == 0
    assert not finished(tmp_path)
    writer(tmp_path).close()
    assert query_ids(tmp_path) == ["q000001"]


@pytest.mark.slow
def test_a_killed_process_loses_at_most_its_last_second_and_the_next_start_finishes_its_file(tmp_path):
    rest = """
one = Writer(sys.argv[1], "ubi_queries", 1 << 20, 60.0)
for number in range(10**6):
    one.write(record(number))
    print(number, time.time(), flush=True)
    time.sleep(0.001)
"""
    process = run(tmp_path, rest)
    first = process.stdout.readline()
    until(lambda: time.time() > float(first.split()[1]) + 1.5, timeout_s=60)
    writer(tmp_path).close()
    assert not finished(tmp_path)  # it lives
    process.send_signal(signal.SIGKILL)
    killed = time.time()
    said = [line.split() for line in [first, *process.communicate()[0].splitlines()] if line.count(" ") == 1]
    write(tmp_path, [search("next")])
    assert not unfinished(tmp_path) and read(tmp_path, "queries")[1] == []
    found = sorted(set(query_ids(tmp_path)) - {"qnext"})
    assert found == [f"q{number:06}" for number in range(len(found))]
    old = [f"q{int(number):06}" for number, moment in said if float(moment) < killed - 1]
    assert len(old) > 20 and set(old) <= set(found)
