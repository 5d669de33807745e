import hashlib
import json
import os

import pytest

from disranker import bundle, lineage
from disranker.recipe import Refused
from disranker.store import Store
from jobs import lineage as job

LOGS = [["/logs/q.ndjson", 1234, 5], ["/logs/e.ndjson", 99, 5]]
FINISHED = "2026-05-01T12:00:00.000+00:00"


def commit(store, artefact, reads, inputs=(), counts=None, **others):
    manifest = {"fingerprint": f"of-{artefact}", "reads": reads, "inputs": list(inputs), "finished": FINISHED}
    store.put_text(json.dumps(manifest | {"counts": counts or {}} | others), artefact, "manifest.json")


def reading(*names):
    return {name: f"of-{name}" for name in names}


@pytest.fixture
def store(tmp_path):
    """Searches and documents of two log files; groups and student are both made of them."""
    store = Store(str(tmp_path / "run"))
    commit(store, "searches", {}, LOGS, {"lines": 12, "models": {"ctr": 1}, "good": True}, rows=1200)
    commit(store, "documents", {}, LOGS, rows=30)
    commit(store, "groups", reading("searches", "documents"), counts={"train": 7})
    store.put_text("rows", "groups", "part-00000.parquet")
    commit(store, "student", reading("documents", "groups"), rests_on_forgotten=["groups"])
    return store


def chain(store):
    return lineage.chain(store, reading("student", "groups"), "of-bundle", FINISHED, [])


def test_the_chain_holds_all_4_artefacts_that_a_bundle_rests_on_and_itself(store):
    found = chain(store)
    assert set(found) == {"bundle", "student", "groups", "documents", "searches"}
    assert found["bundle"].reads == reading("student", "groups") and found["bundle"].manifest is None
    assert found["searches"].files == LOGS and found["groups"].files == []
    assert found["searches"].counts == {"rows": 1200, "lines": 12}


def test_each_artefact_has_the_sha256_of_its_manifest_file(store, tmp_path):
    for name, node in chain(store).items():
        if name != "bundle":
            content = (tmp_path / "run" / name / "manifest.json").read_bytes()
            assert node.manifest == hashlib.sha256(content).hexdigest()


def test_an_artefact_made_anew_since_it_was_read_is_refused_with_both_fingerprints(store):
    commit(store, "documents", {}, LOGS, fingerprint="other")
    with pytest.raises(Refused, match="made of documents of-documents, but there lies other"):
        chain(store)


def test_an_artefact_that_another_reader_has_in_an_older_form_is_refused(store):
    commit(store, "student", {"documents": "of-documents", "groups": "older"})
    with pytest.raises(Refused, match="student was made of groups older, but there lies of-groups"):
        chain(store)


def test_an_absent_artefact_is_refused(store):
    store.unfinish("searches")
    with pytest.raises(Refused, match="searches is not there"):
        chain(store)


def test_the_made_up_world_ends_in_its_own_2_files(tmp_path):
    store = Store(str(tmp_path))
    store.put_text("{}\n", "world", "queries-0.ndjson")
    store.put_text("{}\n{}\n", "world", "logs", "events-0.ndjson")
    commit(store, "world", {})
    found = lineage.chain(store, reading("world"), "of-bundle", FINISHED, [])
    assert found["world"].files == [["world/logs/events-0.ndjson", 6], ["world/queries-0.ndjson", 3]]


def test_the_2_log_files_are_listed_once(store):
    assert lineage.log_files(chain(store)) == sorted(LOGS)


def test_the_tree_goes_from_the_bundle_to_the_files_and_shows_each_artefact_in_full_once(store):
    assert list(lineage.tree(chain(store))) == [
        f"bundle  of-bundle  {FINISHED}",
        f"├─ student  of-student  {FINISHED}",
        "│     made before somebody was forgotten, from groups",
        f"│  ├─ documents  of-documents  {FINISHED}  rows 30",
        "│  │  ├─ /logs/q.ndjson  1,234 bytes",
        "│  │  └─ /logs/e.ndjson  99 bytes",
        f"│  └─ groups  of-groups  {FINISHED}  train 7",
        f"│     ├─ searches  of-searches  {FINISHED}  rows 1,200, lines 12",
        "│     │  ├─ /logs/q.ndjson  1,234 bytes",
        "│     │  └─ /logs/e.ndjson  99 bytes",
        "│     └─ documents  of-documents  (above)",
        "└─ groups  of-groups  (above)",
    ]


def test_a_chain_holds_until_a_manifest_changes_or_goes(store, tmp_path):
    found = chain(store)
    lineage.check(found, store)
    os.utime(tmp_path / "run" / "groups" / "manifest.json", (1, 1))
    lineage.check(found, store)
    commit(store, "groups", reading("searches", "documents"), counts={"train": 8})
    with pytest.raises(Refused, match=f"manifest of groups: sha256 expected {found['groups'].manifest}, found"):
        lineage.check(found, store)
    store.unfinish("groups")
    with pytest.raises(Refused, match="found none"):
        lineage.check(found, store)


@pytest.fixture
def released(store, tmp_path):
    from test_engine import save_student

    bundle.write(tmp_path / "b", save_student(tmp_path, num_hidden_layers=1), name="x", report={}, chain=chain(store))
    return str(tmp_path / "b")


def test_the_job_prints_the_tree_of_a_bundle(released, store, capsys):
    assert job.main([released, "--root", store.uri]) == 0
    assert capsys.readouterr().out.splitlines() == list(lineage.tree(chain(store)))


def test_the_job_refuses_a_changed_run_and_a_broken_bundle(released, store, tmp_path, capsys):
    commit(store, "documents", {}, LOGS, rows=31)
    assert job.main([released, "--root", store.uri]) == 2
    assert "manifest of documents" in capsys.readouterr().err
    with (tmp_path / "b" / "README.md").open("a") as card:
        card.write("!")
    assert job.main([released]) == 2
    assert "README.md: sha256" in capsys.readouterr().err
    assert job.main([store.uri]) == 2
    assert "is no bundle" in capsys.readouterr().err
