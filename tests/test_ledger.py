"""What `jobs.ingest` does to a log, with its tasks run one after the other instead of on Ray."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_logs import row
from test_ubi import NOON, SEARCH, event

from disranker import ledger, recipe, stages
from disranker.ledger import Cell, Ledger
from disranker.recipe import Refused
from disranker.store import Store
from jobs import ingest, parts

NOON_MS = int(NOON.timestamp() * 1000)
DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch):
    monkeypatch.setattr(parts, "each", lambda count, work, what="": [work(number) for number in range(count)])


def log(seed=1, pages=30):
    """(search lines, event lines) over 80 days, with broken ones, late events, duplicates and strays."""
    rng = random.Random(seed)
    searches, events = [], []
    for number in range(pages):
        at = NOON_MS + rng.randrange(80) * DAY_MS
        client = f"c{rng.randrange(6)}"
        searches.append(SEARCH | {"query_id": f"q{number}", "client_id": client, "timestamp": at})
        for _ in range(rng.randrange(3)):
            late = at + rng.choice([1000, 3_600_000, DAY_MS // 2, 2 * DAY_MS])
            named = rng.choice([f"q{number}", f"q{number}", "unknown", None])
            one = event(rng.choice("abcz"), "click", late, named) | {"client_id": client, "user_query": "red shoe"}
            events += [one] * rng.choice([1, 1, 2])
    lines = [[json.dumps(entry) for entry in entries] for entries in (searches, events)]
    lines[0] += ["", "{broken", json.dumps(SEARCH | {"client_id": None})]
    return lines


def given_recipe(folder: Path, **more):
    data = {"queries": [f"{folder}/q*"], "events": [f"{folder}/e*"], "documents": [f"{folder}/none"]}
    cfg = {"parts": 2, "period_days": 30, "max_bad_share": 1.0} | more
    return recipe.parse({"root": str(folder / "run"), "data": data, "ingest": cfg})


def ingested(cfg) -> dict:
    """Reads what there is to read; the tables."""
    store = Store(cfg.root)
    files = {"queries": _files(cfg.data.queries), "events": _files(cfg.data.events), "flat": []}
    step = stages.Step(stages.STAGES[1], "f", {}, {"ingest": cfg.ingest.model_dump(exclude=stages.HOW)}, [])
    counts = ingest._log(cfg, files, store, step)
    searches = store.read_files("searches", store.written("searches")).sort_by("query_id").to_pylist()
    rejects = store.read_files("rejects", store.written("rejects"))
    said = sorted(zip(rejects["reason"].to_pylist(), rejects["raw"].to_pylist(), strict=True))
    return {"searches": searches, "rejects": said, "counts": counts}


def _files(patterns):
    return sorted(str(path) for pattern in patterns for path in Path(pattern).parent.glob(Path(pattern).name))


def tables(found):
    shown = {name: value for name, value in found["counts"].items() if name not in ("files_read", "cells_joined")}
    return found["searches"], found["rejects"], shown


def write(folder: Path, kind: str, pieces: list[list[str]]):
    folder.mkdir(exist_ok=True)
    for number, piece in enumerate(pieces):
        (folder / f"{kind}{number}.ndjson").write_text("".join(line + "\n" for line in piece))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tables of the log in two files, read at once."""
    folder = tmp_path_factory.mktemp("whole")
    searches, events = log()
    write(folder, "q", [searches])
    write(folder, "e", [events])
    before, parts.each = parts.each, lambda count, work, what="": [work(number) for number in range(count)]
    try:
        return tables(ingested(given_recipe(folder)))
    finally:
        parts.each = before


def test_searches_rejects_and_duplicates_are_all_lines(whole):
    searches, rejects, counts = whole
    assert len(searches) == counts["searches"] == 30 and counts["lines"] == sum(map(len, log()))
    used = (
        counts["clicks"]
        + counts["conversions"]
        + counts["searches"]
        + counts["duplicate_events"]
        + counts["duplicate_queries"]
    )
    assert used + len(rejects) + counts["other_events"] == counts["lines"]
    assert counts["broken"] == 3 and counts["found_by_client_and_query"] > 0


cuts = st.lists(st.tuples(st.sampled_from("qe"), st.integers(0, 3)), min_size=60, max_size=60)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 4), st.randoms(use_true_random=False), st.booleans())
def test_any_split_into_files_in_any_order_at_once_or_bit_by_bit_gives_the_same_tables(
    tmp_path_factory, whole, files, rng, at_once
):
    folder = tmp_path_factory.mktemp("split")
    cfg = given_recipe(folder)
    lines = [(kind, line) for kind, entries in zip("qe", log(), strict=True) for line in entries]
    rng.shuffle(lines)
    pieces = [lines[start::files] for start in range(files)]
    for number, piece in enumerate(pieces):
        for kind in "qe":
            (folder / f"{kind}{number}.ndjson").write_text("".join(f"{line}\n" for of, line in piece if of == kind))
        if not at_once:
            found = ingested(cfg)
    found = ingested(cfg)
    assert tables(found) == whole
    assert found["counts"]["files_read"] == (2 * files if at_once else 0)


@pytest.mark.parametrize("most", [1, 7])
def test_few_clients_at_a_time_give_the_same_tables_in_groups_of_whole_clients(tmp_path, monkeypatch, whole, most):
    monkeypatch.setattr(ledger, "MOST_RECORDS", most)
    searches, events = log()
    write(tmp_path, "q", [searches])
    write(tmp_path, "e", [events])
    cfg = given_recipe(tmp_path)
    assert tables(ingested(cfg)) == whole
    groups, paths = 0, list((tmp_path / "run" / "searches").glob("*.parquet"))
    for path in paths:
        file = pq.ParquetFile(path)
        clients = [set(file.read_row_group(at)["client"].to_pylist()) for at in range(file.num_row_groups)]
        assert sum(map(len, clients)) == len(set().union(*clients))
        groups += len(clients)
    assert groups > len(paths)


def test_only_new_files_are_read_and_only_what_they_reach_is_joined(tmp_path):
    searches, events = log()
    write(tmp_path, "q", [searches])
    write(tmp_path, "e", [events])
    cfg = given_recipe(tmp_path)
    first = ingested(cfg)
    assert first["counts"]["files_read"] == 2
    before = {info.path: info.mtime_ns for info in Store(cfg.root).files("searches")}
    late = event("b", "click", NOON_MS + 1_000_000, "q999") | {"client_id": "c1"}
    page = SEARCH | {"query_id": "q999", "client_id": "c1", "timestamp": NOON_MS}
    (tmp_path / "q1.ndjson").write_text(json.dumps(page) + "\n")
    (tmp_path / "e1.ndjson").write_text(json.dumps(late) + "\n")
    second = ingested(cfg)
    assert (second["counts"]["files_read"], second["counts"]["searches"]) == (2, 31)
    # One client in one day, near no border of a period: one cell, of a parquet file and its counts.
    after = {info.path: info.mtime_ns for info in Store(cfg.root).files("searches")}
    assert second["counts"]["cells_joined"] == len(after.items() - before.items()) / 2 <= 2
    assert ingested(cfg)["counts"]["cells_joined"] == 0


def test_a_click_that_arrives_in_a_later_file_is_no_reject_any_more(tmp_path):
    cfg = given_recipe(tmp_path)
    write(tmp_path, "q", [[json.dumps(SEARCH | {"query_id": "other"})]])
    write(tmp_path, "e", [[json.dumps(event("b"))]])
    assert [reason for reason, _ in ingested(cfg)["rejects"]] == ["no result page has this query_id"]
    (tmp_path / "q1").write_text(json.dumps(SEARCH) + "\n")
    found = ingested(cfg)
    assert found["rejects"] == [] and found["counts"]["clicks"] == 1


def test_a_file_that_grew_is_read_again_and_its_old_lines_do_not_double(tmp_path):
    searches, events = log()
    write(tmp_path, "q", [[*searches[:10], searches[10][:20]]])  # its last line is half written
    write(tmp_path, "e", [events])
    cfg = given_recipe(tmp_path)
    ingested(cfg)
    write(tmp_path, "q", [searches])
    grown = ingested(cfg)
    fresh = tmp_path / "fresh"
    write(fresh, "q", [searches])
    write(fresh, "e", [events])
    assert tables(grown) == tables(ingested(given_recipe(fresh)))


BORDER_MS = 690 * 30 * DAY_MS  # the 690th period of 30 days begins


@pytest.mark.parametrize("first", ["q", "e"])
def test_a_page_and_its_click_on_two_sides_of_a_border_meet_whichever_comes_first(tmp_path, first):
    page = SEARCH | {"timestamp": BORDER_MS - 1000}
    lines = {"q": [json.dumps(page)], "e": [json.dumps(event("b", "click", BORDER_MS + 1000))]}
    cfg = given_recipe(tmp_path)
    write(tmp_path, "q", [[]])
    write(tmp_path, "e", [[]])
    for kind in (first, "e" if first == "q" else "q"):
        write(tmp_path, kind, [lines[kind]])
        try:
            found = ingested(cfg)
        except Refused:  # a click alone is no log
            assert first == "e"
    assert found["rejects"] == [] and found["counts"]["clicks"] == 1


def test_what_a_changed_file_no_longer_says_is_gone_also_where_the_new_lines_do_not_reach(tmp_path):
    old, new = SEARCH, SEARCH | {"query_id": "q2", "timestamp": NOON_MS + 200 * DAY_MS}
    write(tmp_path, "q", [[json.dumps(old)]])
    write(tmp_path, "e", [[]])
    cfg = given_recipe(tmp_path)
    assert [search["query_id"] for search in ingested(cfg)["searches"]] == ["q1"]
    write(tmp_path, "q", [[json.dumps(new) + " "]])
    assert [search["query_id"] for search in ingested(cfg)["searches"]] == ["q2"]


def test_what_a_killed_run_left_of_a_batch_is_removed(tmp_path):
    write(tmp_path, "q", [log()[0]])
    write(tmp_path, "e", [log()[1]])
    cfg = given_recipe(tmp_path)
    ingested(cfg)
    (folder,) = (tmp_path / "run" / "records").iterdir()
    (folder / "half").mkdir()
    (folder / "half" / "records-00000-687-00000-0.arrow").write_bytes(b"ARROW1")
    write(tmp_path, "q", [log()[0] + [json.dumps(SEARCH)]])
    ingested(cfg)
    assert not (folder / "half").exists()


def test_killed_between_any_two_commits_and_run_again_the_tables_are_the_same(tmp_path, monkeypatch, whole):
    """Every write of a file is a place to die at; each is tried."""
    searches, events = log()
    died, number = True, 0
    while died:
        folder = tmp_path / str(number)
        write(folder, "q", [searches])
        write(folder, "e", [events])
        cfg, died = given_recipe(folder), False
        with monkeypatch.context() as patch:
            countdown = iter(range(number, -1, -1))
            put = Store._put

            def dying(self, path, write, put=put, countdown=countdown):
                if next(countdown) == 0:
                    raise KeyboardInterrupt
                put(self, path, write)

            patch.setattr(Store, "_put", dying)
            try:
                ingested(cfg)
            except (KeyboardInterrupt, StopIteration):
                died = True
        assert tables(ingested(cfg)) == whole
        number += 1
    assert number > 10


def test_what_another_setting_read_is_dropped(tmp_path):
    write(tmp_path, "q", [log()[0]])
    write(tmp_path, "e", [log()[1]])
    ingested(given_recipe(tmp_path))
    ingested(given_recipe(tmp_path, period_days=10))
    assert len(list((tmp_path / "run" / "records").iterdir())) == 1


def test_a_log_that_was_moved_with_its_run_counts_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", "q", [log()[0]])
    write(tmp_path / "a", "e", [log()[1]])
    data = {"queries": ["q*"], "events": ["e*"], "documents": ["none"]}
    cfg = recipe.parse({"root": "run", "data": data, "ingest": {"parts": 2, "max_bad_share": 1.0}})
    monkeypatch.setattr(
        "test_ledger._files", lambda patterns: sorted(str(p.absolute()) for p in Path().glob(patterns[0]))
    )
    monkeypatch.chdir(tmp_path / "a")
    before = tables(ingested(cfg))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    assert tables(ingested(cfg)) == before


@pytest.mark.parametrize(("share", "refused"), [(0.0, True), (0.9, False)])
def test_more_rejects_than_allowed_refuse_the_log_with_the_three_commonest_and_examples(tmp_path, share, refused):
    write(tmp_path, "q", [log()[0]])
    write(tmp_path, "e", [log()[1]])
    cfg = given_recipe(tmp_path, max_bad_share=share)
    if not refused:
        assert ingested(cfg)["counts"]["searches"] == 30
        return
    with pytest.raises(
        Refused, match=r"lines were refused, .*max_bad_share allows 0\.0%; they lie in .*rejects"
    ) as why:
        ingested(cfg)
    assert str(why.value).count(" as ") == 3 and f"{tmp_path}/e0.ndjson:" in str(why.value)
    assert Store(cfg.root).written("rejects")


def test_a_log_without_a_valid_search_is_refused(tmp_path):
    write(tmp_path, "q", [["{}", "x"]])
    write(tmp_path, "e", [[]])
    with pytest.raises(Refused, match=r"data.queries: .*q0.ndjson, .* not one valid search in 2 lines"):
        ingested(given_recipe(tmp_path))


# Forgetting


def test_a_forgotten_client_is_in_no_record_search_or_reject_and_no_log_brings_it_back(tmp_path):
    searches, events = log()
    searches.append('{"client_id": "c3", "user_query": "half a li')
    write(tmp_path, "q", [searches])
    write(tmp_path, "e", [events])
    cfg = given_recipe(tmp_path)
    before = ingested(cfg)
    store = Store(cfg.root)
    at = Ledger(store, next((tmp_path / "run" / "records").iterdir()).name, cfg.ingest)
    lines = at.lines_of(["c3"])
    assert lines > 3 and at.lines_of(["nobody"]) == 0
    ledger.remember_to_forget(store, ["c3"])
    assert at.forget(["c3"]) == lines and at.lines_of(["c3"]) == 0
    after = ingested(cfg)
    assert after["searches"] == [search for search in before["searches"] if search["client"] != "c3"]
    assert len(after["searches"]) < len(before["searches"]) and not any("c3" in raw for _, raw in after["rejects"])
    (tmp_path / "q1").write_text(json.dumps(SEARCH | {"query_id": "new", "client_id": "c3"}) + "\n")
    again = ingested(cfg)
    assert again["searches"] == after["searches"] and again["counts"]["of_forgotten_clients"] == 1


def test_the_id_of_a_forgotten_client_is_not_kept(tmp_path):
    store = Store(str(tmp_path))
    ledger.remember_to_forget(store, ["c3"])
    ledger.remember_to_forget(store, ["c4"])
    assert set(ledger.forgotten(store)) == {ledger.hashed("c3"), ledger.hashed("c4")} and ledger.forgot_at(store)
    assert "c3" not in (tmp_path / "forgotten.json").read_text()


# Writing


def test_times_that_jump_about_do_not_open_a_file_for_each_period_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "MOST_OPEN", 3)
    cfg = given_recipe(tmp_path, period_days=1).ingest
    at = Ledger(Store(str(tmp_path)), "name", cfg)
    writer = ledger.Writer(at, "b", 0)
    from disranker import logs

    for _ in range(2):
        writer.add(logs.table([row(str(day), seconds=day * 86_400) for day in range(10)]))
        assert len(writer.writers) <= 3
    said = writer.close()
    at.commit("b", [["f", 1, 1]], [said])
    found = {
        day: sum(rows.num_rows for part in range(2) for rows in at.slices(Cell(part, day)))
        for _, day in said["reaches"]
    }
    assert sorted(found.values())[-8:] == [6] * 8  # of the day, the one before and the one after
