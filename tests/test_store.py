import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest
from builders import Dies

from disranker import store
from disranker.recipe import Refused
from disranker.store import Store

DOCS = [{"doc_id": "a", "title": "1", "summary": ""}, {"doc_id": "b", "title": "2", "summary": ""}]


@pytest.fixture(params=["path", "uri"])
def at(request, tmp_path):
    return Store(str(tmp_path) if request.param == "path" else f"file://{tmp_path}")


def test_3_rows_in_2_parts_are_read_in_the_order_of_parts_once_committed(at):
    at.write("documents", 1, DOCS[1:])
    at.write("documents", 0, [*DOCS[:1], {"doc_id": "c", "title": "3", "summary": ""}])
    at.commit("documents", {"fingerprint": "f"})
    assert at.read("documents")["doc_id"].to_pylist() == ["a", "c", "b"]
    manifest = at.manifest("documents")
    assert manifest["rows"] == 3 and manifest["fingerprint"] == "f"
    assert manifest["parts"] == ["part-00000.parquet", "part-00001.parquet"]
    assert manifest["schema"] == {"doc_id": "string", "title": "string", "summary": "string"}
    assert manifest["bytes"] == sum(Path(path).stat().st_size for path in at.parts("documents"))


def test_a_table_without_a_manifest_does_not_exist_whatever_files_lie_there(at):
    at.write("documents", 0, DOCS)
    assert at.finished("documents") is None and len(at.written("documents")) == 1
    with pytest.raises(FileNotFoundError):
        at.read("documents")


def test_a_part_written_twice_holds_the_second_alone(at):
    at.write("documents", 0, DOCS)
    at.write("documents", 0, DOCS[:1])
    at.commit("documents", {})
    assert at.read("documents").to_pylist() == DOCS[:1] and at.manifest("documents")["rows"] == 1


def test_a_part_that_was_written_after_the_commit_is_not_read(at):
    at.write("documents", 0, DOCS)
    at.commit("documents", {})
    at.write("documents", 1, DOCS)
    assert at.read("documents").num_rows == 2


def test_a_file_that_tore_while_written_is_no_part(at):
    at.write("documents", 0, DOCS)
    Path(at.at("documents", "part-00001.parquet.unfinished")).write_bytes(b"PAR1")
    at.commit("documents", {})
    assert at.read("documents").num_rows == 2


def test_one_part_columns_and_a_condition(at):
    at.write("documents", 0, DOCS)
    at.commit("documents", {})
    assert at.read("documents", part=0).num_rows == 2
    assert at.read("documents", part=7).num_rows == 0 and at.read("documents", part=7).schema.names == [
        "doc_id",
        "title",
        "summary",
    ]
    found = at.read("documents", columns=["title"], where=pyarrow.dataset.field("doc_id") == "b")
    assert found.to_pylist() == [{"title": "2"}]
    assert at.read("documents", columns=["title"], part=7).schema.names == ["title"]


def test_clear_removes_manifest_and_files_and_an_unknown_name_is_no_error(at):
    at.write("documents", 0, DOCS)
    at.commit("documents", {})
    at.clear("documents")
    assert at.finished("documents") is None and at.files("documents") == []
    at.clear("documents")


def test_clear_removes_the_manifest_first(at, monkeypatch):
    at.write("documents", 0, DOCS)
    at.commit("documents", {})
    monkeypatch.setattr(at, "fs", Dies(at.fs))
    with pytest.raises(KeyboardInterrupt):
        at.clear("documents")
    assert at.finished("documents") is None and len(at.files("documents")) == 1


def test_unfinish_leaves_the_files(at):
    at.write("documents", 0, DOCS)
    at.commit("documents", {})
    at.unfinish("documents")
    at.unfinish("documents")
    assert at.finished("documents") is None and len(at.written("documents")) == 1


def test_drop_run_removes_the_runs_of_one_stage_alone(at):
    for run in ("distill-1", "distill-2", "pretrain-1"):
        at.put_text("x", "runs", run, "state")
    at.drop_run("distill")
    assert [Path(info.path).parent.name for info in at.files("runs")] == ["pretrain-1"]
    Store(at.root + "/elsewhere").drop_run("distill")


def test_a_folder_goes_in_and_comes_out(at, tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text("{}")
    at.put_folder(model, "student")
    assert (Path(at.folder("student")) / "config.json").read_text() == "{}"
    assert at.folder("student") == at.at("student")
    at.commit("student", {"fingerprint": "f"})
    assert at.manifest("student") == {"fingerprint": "f", "bytes": 2}


def test_what_is_far_away_is_copied_to_a_local_folder(at, monkeypatch):
    at.put_text("{}", "student", "config.json")
    monkeypatch.setattr(Store, "local", False)
    copy = Path(at.folder("student"))
    assert copy != Path(at.at("student")) and (copy / "config.json").read_text() == "{}"


def test_a_store_sent_to_another_process_finds_the_same_files(at, monkeypatch, tmp_path_factory):
    at.put_text("here", "note")
    sent = pickle.dumps(at)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert Path(pickle.loads(sent).at("note")).read_text() == "here"


def test_a_relative_root_is_the_same_in_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Store("runs"))
    monkeypatch.chdir("/")
    assert pickle.loads(sent).path == str(tmp_path / "runs")


def test_a_write_that_died_leaves_the_part_that_was_there(at, monkeypatch):
    at.write("documents", 0, DOCS)
    before = Path(at.written("documents")[0]).read_bytes()

    def die(rows, out):
        out.write(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(store.pq, "write_table", die)
    with pytest.raises(KeyboardInterrupt):
        at.write("documents", 0, DOCS[:1])
    assert [Path(path).read_bytes() for path in at.written("documents")] == [before]


def test_a_place_that_cannot_be_written_to_is_named_by_its_own_error(at, monkeypatch):
    class ReadOnly:
        def __getattr__(self, name):
            return getattr(filesystem, name)

        def open_output_stream(self, path):
            raise OSError("read-only file system")

    filesystem = at.fs
    monkeypatch.setattr(at, "fs", ReadOnly())
    monkeypatch.setattr(Store, "local", True)
    with pytest.raises(OSError, match="read-only file system"):
        at.write("documents", 0, DOCS)


def test_a_relative_root_stays_where_it_was_when_the_store_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("runs").uri == str(tmp_path / "runs") and Store("file:///a/b").uri == "file:///a/b"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.json", "b.json.gz", "sub/c.json", "d[1].json", "e?"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.json", ["a.json"]),
        ("*.gz", ["b.json.gz"]),
        ("?.json", ["a.json"]),
        ("[ab].json*", ["a.json", "b.json.gz"]),
        ("sub", ["sub/c.json"]),
        ("sub/", ["sub/c.json"]),
        ("s*/*.json", ["sub/c.json"]),
        ("d[1].json", ["d[1].json"]),
        ("", ["a.json", "b.json.gz", "d[1].json", "e?", "sub/c.json"]),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_a_glob_a_folder_and_a_uri_name_the_same_files(folder, pattern, names, scheme):
    if scheme and set("[?") & set(pattern):
        pytest.skip("a bracket is no character of a URI, and a question mark starts its options")
    found = store.expand([f"{scheme}{folder}/{pattern}"], "queries")
    assert found == [f"{scheme}{folder}/{name}" for name in names]


def test_the_options_of_a_uri_stay_with_each_file(folder):
    found = store.expand([f"file://{folder}/*.json?region=eu"], "queries")
    assert found[0] == f"file://{folder}/a.json?region=eu" and store.locate(found[0])[1] == f"{folder}/a.json"


def test_files_named_twice_are_read_once_in_order(folder):
    a, b = f"{folder}/a.json", f"{folder}/b.json.gz"
    assert store.expand([b, f"{folder}/*.json*", a], "queries")[:2] == [a, b]
    assert len(store.expand([a, a], "queries")) == 1


@pytest.mark.parametrize("pattern", ["none.json", "*.csv", "none/*.json"])
def test_a_pattern_that_names_nothing_is_refused_even_beside_one_that_does(folder, pattern):
    with pytest.raises(Refused, match=r"data\.events: nothing at .*give a file, a folder or a glob"):
        store.expand([f"{folder}/a.json", f"{folder}/{pattern}"], "events")


def test_a_folder_is_told_from_a_file(folder):
    assert store.is_folder(str(folder)) and store.is_folder(f"file://{folder}")
    assert not store.is_folder(f"{folder}/a.json") and not store.is_folder("bert-base-uncased")


def test_a_table_that_does_not_conform_is_not_written(at):
    with pytest.raises(KeyError):
        at.write("documents", 0, pa.table({"doc_id": ["a"]}))
    assert at.files("documents") == []
