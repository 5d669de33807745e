"""Nights after the pipeline: what a day is told by, what a night forgets, and three days on a real Ray."""

import gzip
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from safetensors.torch import load_file

from bench import runs
from bench.endpoints import Endpoint
from disranker import bundle, recipe, refresh, stages
from disranker.labels import Labels
from disranker.recipe import Evaluate, Refresh, Refused
from disranker.refresh import IN_SERVICE, NEW
from disranker.store import Store
from disranker.tables import SCHEMAS
from jobs import distill, launch, pipeline
from jobs import refresh as job
from jobs.score import Teacher

CFG = Evaluate(resamples=300)


# The log of a day


def page(query, documents, clicked=()):
    hits = [
        {"doc_id": doc_id, "position": place, "clicked": place in clicked, "dwell_s": None, "converted": False}
        for place, doc_id in enumerate(documents, start=1)
    ]
    return {"query_id": "q", "query": query, "client": "c", "time": 0, "hits": hits, "shuffled": False}


def counted(*pages):
    return refresh.seen(pa.Table.from_pylist(list(pages), SCHEMAS["searches"]))


def test_a_log_is_counted_by_query_document_and_position():
    found = counted(page("a", ["x", "y"], {2}), page("a", ["x"], {1}), page("b", []))
    assert found.rows() == [
        ("document", "x", 2, 1),
        ("document", "y", 1, 1),
        ("position", "1", 2, 1),
        ("position", "2", 1, 1),
        ("query", "a", 2, 0),
        ("query", "b", 1, 0),
    ]


def test_a_day_is_what_the_whole_log_has_more_than_before():
    first, second = page("a", ["x", "y"], {2}), page("b", ["x"], {1})
    assert refresh.since(counted(first, second), counted(first)).rows() == counted(second).rows()
    assert refresh.since(counted(first), counted(first, second)).is_empty()  # somebody was forgotten
    clicked, shown = page("a", ["x"], {1}), page("a", ["x"])  # one was forgotten, and three came
    assert {row[2:] for row in refresh.since(counted(*[shown] * 3), counted(clicked)).rows()} == {(2, 0)}
    assert refresh.added([counted(first), counted(second)]).rows() == counted(first, second).rows()


def days(new=0.0, fresh=0.0, click=lambda n: {n % 3 + 1}, searches=600):
    """A day of searches for 20 queries: a share of them for queries, or with documents, that are new."""
    return counted(
        *(
            page(
                f"{'new' if n < new * searches else 'old'} {n % 20}",
                [f"{'new' if n < fresh * searches else 'old'} {place}" for place in range(10)],
                click(n),
            )
            for n in range(searches)
        )
    )


@pytest.mark.parametrize(
    ("today", "drifted"),
    [
        (days(), []),
        (days(new=0.6), ["max_new_queries"]),
        (days(fresh=0.6), ["max_new_documents"]),
        (days(click=lambda n: {n % 3 + 1, 5}), ["max_click_change", "max_position_shift"]),
        (days(click=lambda n: {10 - n % 3}), ["max_position_shift"]),
        (days(click=lambda n: {n % 3 + 1} if n % 2 else set()), ["max_click_change"]),
        (days(click=lambda _: set()), []),  # nothing to compare
        (days(searches=0), []),
    ],
)
def test_each_number_tells_the_drift_that_it_is_for(today, drifted):
    assert [one.name for one in refresh.drift(today, days(searches=3000), Refresh()) if one.drifted] == drifted


def test_a_share_of_4_in_10_over_a_bar_of_3_is_chance_in_10_searches_and_a_drift_in_1000():
    few, many = (refresh.drift(days(new=0.4, searches=n), days(), Refresh())[0] for n in (10, 1000))
    assert (few.value, few.drifted) == (many.value, not many.drifted) == (0.4, False)
    assert 0 < few.low < 0.1 and 0.35 < many.low < 0.4


def test_clicks_that_double_change_by_all_of_them_and_those_that_halve_by_half():
    once, twice = days(click=lambda n: {n % 3 + 1}), days(click=lambda n: {n % 3 + 1, 5})
    for today, before, change in ((twice, once, 1.0), (once, twice, 0.5)):
        assert refresh.drift(today, before, Refresh())[2].value == pytest.approx(change)


@pytest.mark.parametrize(("searches", "drifted"), [(12, False), (60, True)])
def test_positions_of_a_few_clicks_shift_by_chance(searches, drifted):
    today = days(click=lambda n: {1 if n % 3 else 3}, searches=searches)
    measure = refresh.drift(today, days(click=lambda n: {n % 3 + 1}), Refresh())[3]
    assert measure.value > 5 * measure.bar and measure.drifted == drifted


def test_the_psi_of_a_third_and_two_thirds_turned_round_is_the_log_of_two_by_two_thirds():
    one, other = (days(click=lambda n, at=at: {at} if n % 3 else {3 - at}) for at in (1, 2))
    many = [of.with_columns(pl.col("shown", "clicked") * 100) for of in (one, other)]
    measure = refresh.drift(*many, Refresh())[3]
    assert measure.value == pytest.approx(2 / 3 * np.log(2), abs=2e-3)
    assert "position 1.3 on average, on 1.7" in measure.sentence


# The steps of a night


@pytest.fixture
def shop(tmp_path):
    """A recipe with one log file."""
    data = {"queries": "q-1", "events": "e-1", "documents": "d-1"}
    for name in data.values():
        (tmp_path / name).write_text("")
    globs = {what: [f"{tmp_path}/{name[:2]}*"] for what, name in data.items()}
    return recipe.parse(
        {"root": str(tmp_path / "run"), "data": globs, "student": {"width": 32, "heads": 2, "layers": 1}}
    )


def test_a_night_starts_its_student_from_the_bundle_in_service_and_holds_it_against_that_one(shop, released):
    tonight = refresh.nightly(shop, str(released))
    assert recipe.parse(tonight.model_dump()) == tonight  # as a worker reads it
    assert (tonight.student.base, tonight.student.layers, tonight.student.take) == (str(released), 1, "first")
    assert tonight.publish.in_service == str(released)
    assert tonight.model_copy(update={"student": shop.student, "publish": shop.publish}) == shop


def test_a_night_does_the_steps_of_the_pipeline_but_the_teachers_which_stands(shop, tmp_path):
    plain, night = ({step.stage.name: step for step in of} for of in (stages.steps(shop), refresh.steps(shop, "t")))
    assert [name for name in plain if name not in night] == ["pretrain", "finetune"]
    for name in ("ingest", "aggregate", "sample"):
        assert night[name] == plain[name]  # what the pipeline did stands
    assert night["score"].reads == {"teacher": "t", "groups": night["sample"].fingerprint}
    assert night["distill"].reads["labels"] == night["score"].fingerprint != plain["score"].fingerprint
    assert list(night)[-1] == "publish" and night["publish"].reads["student"] == night["distill"].fingerprint
    (tmp_path / "q-2").write_text("")
    later = {step.stage.name: step.fingerprint for step in refresh.steps(shop, "t")}
    assert not set(later.values()) & {step.fingerprint for step in night.values()}


# The matrix


def ranked(qrels, good):
    """A run that has the best order for the good queries, and the worst one for the others."""
    return {q: {d: g if q in good else -g for d, g in of.items()} for q, of in qrels.items()}


@pytest.fixture(scope="module")
def rows(qrels):
    """A new student that learned 10 new queries and forgot 10 of 30 old ones."""
    queries = sorted(qrels)
    runs = {IN_SERVICE: ranked(qrels, queries[:30]), NEW: ranked(qrels, queries[10:])}
    age = refresh.by_age(qrels, queries[:30], [])
    cut = {"age": age, "half": {"forgot": queries[:10], "one": queries[:1]}}
    return refresh.matrix(qrels, refresh.graded(qrels, runs), cut, CFG, 1)


def test_a_slice_that_the_new_student_forgot_is_marked_and_one_that_it_learned(rows):
    assert [(row["slice"], row["queries"], row["tone"]) for row in rows] == [
        ("all", 40, ""),
        ("measured before", 30, "down"),
        ("new today", 10, "up"),
        ("forgot", 10, "down"),
        ("one", 1, ""),  # one query may be of chance
    ]
    values = {row["slice"]: [row["models"][model]["value"] for model in (IN_SERVICE, NEW)] for row in rows}
    assert values["forgot"][0] == values["new today"][1] == 1.0
    for row in rows:
        one, other = values[row["slice"]]
        assert row["difference"] == pytest.approx(other - one)


def test_a_query_is_old_new_or_graded_since():
    assert refresh.by_age(["a", "b", "c"], ["a"], ["a", "b"]) == {
        "measured before": ["a"],
        "new today": ["c"],
        "measured since": ["b"],
    }
    assert refresh.by_age(["a"], [], []) == {"new today": ["a"]}


def test_the_teachers_order_judges_queries_that_nobody_graded():
    groups = [{"query": f"q{n:02}", "docs": [{"doc_id": d} for d in "abc"]} for n in range(20)]
    scores = [[0.5, None, 0.5] if n == 19 else [3.5, -1.0, None if n == 18 else 0.2] for n in range(20)]
    orders = refresh.orders(groups, scores)
    assert orders["q00"] == {"a": 2, "b": 0, "c": 1} and orders["q18"] == {"a": 1, "b": 0} and len(orders) == 19
    # One of the three pairs is wrong in service, in the list of two none is; the new one turns all round.
    given = {IN_SERVICE: {"a": 3, "b": 1, "c": 0}, NEW: {"b": 2, "c": 1, "a": 0}}
    runs = {model: dict.fromkeys(orders, scores) for model, scores in given.items()}
    age = refresh.by_age(orders, [], ["q00"])
    rows = refresh.matrix(orders, refresh.taught(orders, runs), {"age": age}, CFG, 1, refresh.AGREEMENT)
    assert [(row["slice"], row["queries"], row["tone"]) for row in rows] == [
        ("all", 19, "down"),
        ("new today", 18, "down"),
        ("measured since", 1, ""),
    ]
    assert [rows[2]["models"][model]["value"] for model in (IN_SERVICE, NEW)] == [2 / 3, 0.0]
    assert rows[0]["models"][IN_SERVICE]["value"] == (18 * 2 + 1) / (18 * 3 + 1)
    assert refresh.matrix([], {}, {}, CFG, 1) == []


def test_the_page_says_what_drifted_and_what_was_forgotten(rows):
    measures = refresh.drift(days(new=0.6), days(), Refresh())
    found = refresh.content("3", "2", {"pairs": 7}, measures, rows, rows[:1])
    assert json.loads(json.dumps(found)) == found
    assert (found["drifted"], found["forgotten"]) == (
        ["max_new_queries"],
        ["age: measured before, ndcg@10", "half: forgot, ndcg@10"],
    )
    html = refresh.html(found, CFG)
    assert html.count('class="down"') == 2 and html.count(">drift<") == 1 and html.count(">as before<") == 3
    assert "60.0% of the 600 searches" in html and "the new student is worse: it forgets" in html
    assert "http" not in html.replace("http://www.w3.org", "")


# What the job reads and writes


def service(folder, content=None, **user_config):
    deployments = [{"name": "Reranker", "user_config": user_config, "max_ongoing_requests": 10}]
    content = content or {"http_options": {"port": 8000}, "applications": [{"name": "d", "deployments": deployments}]}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("content", "user_config", "told"),
    [
        (None, {}, "0 deployments have user_config.bundle"),
        (None, {"bundle": "b", "bundel": "c"}, "serve: bundel: Extra inputs are not permitted"),
        ({"applications": 3}, {}, "is no Serve config"),
        (["a"], {}, "is no Serve config"),
        (
            None,
            {"bundle": "b", "experiment": {"name": "mine", "kind": "shadow", "bundle": "c", "share": 0.1}},
            "tries experiment mine; end it before",
        ),
    ],
)
def test_a_serve_config_that_a_night_must_not_change_is_refused(content, user_config, told, tmp_path):
    with pytest.raises(Refused, match=told):
        job.serving(service(tmp_path, content, **user_config))


def test_a_run_without_a_teacher_is_refused_in_one_line(tmp_path, capsys):
    data = {"queries": ["q"], "events": ["e"], "documents": ["d"]}
    asked = command(tmp_path, {"root": str(tmp_path / "run"), "data": data}, service(tmp_path, bundle="b"), "1")
    assert job.main(asked) == 2
    assert capsys.readouterr().err == f"refused: refresh: no teacher in {tmp_path}/run; run jobs.pipeline first\n"
    assert job.main(command(tmp_path, {"root": "r"}, service(tmp_path, bundle="b"), "1")) == 2
    assert "the made-up world has no second day" in capsys.readouterr().err
    assert job.main([*asked[:-1], "../1"]) == 2


def test_a_teacher_that_stays_names_the_log_it_was_trained_on(tmp_path):
    store, data = Store(str(tmp_path)), {"queries": ["q"], "events": ["e"], "documents": ["d"]}
    made_of = {"searches": [], "groups": ["searches"], "decoder": ["groups"], "teacher": ["decoder", "groups"]}
    for name, reads in made_of.items():
        inputs = [] if reads else [["/logs/1", 7, 1]]
        plain = {"fingerprint": name, "inputs": inputs, "finished": "now", "counts": {}, "rows": 1}
        store.put_text(json.dumps(plain | {"reads": {of: of for of in reads}}), name, "manifest.json")
    given = recipe.parse({"root": str(tmp_path), "data": data})
    assert job._teacher(given, store) == "teacher"
    kept = store.manifest("teacher")
    assert (kept["reads"], kept["inputs"]) == ({}, [["/logs/1", 7, 1]])
    assert kept["trained_on"] == {"decoder": "decoder", "groups": "groups"}
    assert job._teacher(given, store) == "teacher" and store.manifest("teacher") == kept


def test_a_bundle_is_released_once_and_another_never_over_it(released, other, tmp_path):
    store, folder = Store(str(tmp_path / "run")), tmp_path / "bundles" / "day"
    store.put_folder(released, "bundle/student")
    assert job._release(store, folder) == folder == job._release(store, folder)
    assert bundle.verify(folder)["name"] == "shoes" and list(folder.parent.iterdir()) == [folder]
    store.clear("bundle")
    store.put_folder(other, "bundle/student")
    with pytest.raises(Refused, match="is there already, and is another bundle"):
        job._release(store, folder)


def test_a_deployment_that_fails_says_so_and_a_config_that_cannot_be_written_stays(tmp_path, monkeypatch):
    path = service(tmp_path, bundle="b")
    monkeypatch.setattr(job, "SERVE", "false")
    night = job.Night("1", path, tmp_path, "http://127.0.0.1:1")
    with pytest.raises(launch.Failed, match=r"serve deploy .*: status 1"):
        job._canary(*job.serving(path), night, tmp_path / "1", 0.1)
    assert job.serving(path)[1]["experiment"]["share"] == 0.1
    before = path.read_bytes()
    monkeypatch.setattr(job.shutil, "copymode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job._canary(*job.serving(path), night, tmp_path / "2", 0.1)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_night_deploys_its_canary_beside_the_bundle_that_serves(released, other, tmp_path, monkeypatch):
    with Endpoint(tmp_path).up() as ours:
        ours.deploy(released, cpus=1)
        for name, value in ours.variables.items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "config.yaml"
        job._canary(*job.serving(path), job.Night("1", path, tmp_path, ours.dashboard), Path(other), 0.5)
        ready = runs.until(lambda: tried(ours.port), ours.processes[0], 60)
    assert ready["experiment"]["name"] == "refresh-1" and "refused" not in ready
    assert ready["bundle"] == bundle.digest(released)


def tried(port):
    """What the endpoint says of itself, once it tries a candidate."""
    ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).json()
    return "experiment" in ready and ready


def command(folder, content, path, day, *overrides):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    sets = [word for override in overrides for word in ("--set", override)]
    return ["--recipe", str(file), *sets, "--service", str(path), "--day", day]


# Three days


class Shop:
    """The log of a shop that grows by a day. A day has the searches of one shard of the first, a month later."""

    def __init__(self, world: Path, folder: Path):
        self.folder, self.world = folder, world
        folder.mkdir()
        for path in world.glob("ubi_*"):
            shutil.copy(path, folder)
        for name in ("documents", "judgments"):
            shutil.copy(world / f"{name}.parquet", folder / f"{name}-1.parquet")

    def data(self) -> dict:
        names = {"queries": "ubi_queries-*", "events": "ubi_events-*"}
        names |= {"documents": "documents-*", "judgments": "judgments-*"}
        return {what: [str(self.folder / name)] for what, name in names.items()}

    def day(self, shard: int, word: str, renamed: set[str], drift: bool = False) -> None:
        """Some queries get a word before them, and keep their grades. In a drift half of the documents are new, and
        who clicked the first result clicks the last."""
        shown = {}

        def searched(line):
            query = " ".join(line["user_query"].lower().split())
            hits = [self.document(doc_id, drift) for doc_id in line["query_response_hit_ids"]]
            shown[line["query_id"]] = dict(
                zip(line["query_response_hit_ids"], hits[::-1] if drift else hits, strict=True)
            )
            return {"user_query": f"{word} {query}" if query in renamed else query, "query_response_hit_ids": hits}

        def happened(line):
            named = line["event_attributes"]["object"]["object_id"]
            doc_id = shown.get(line["query_id"], {}).get(named, named)
            return {"event_attributes": line["event_attributes"] | {"object": {"object_id": doc_id}}}

        for kind, changed in (("queries", searched), ("events", happened)):
            lines = gzip.open(self.world / f"ubi_{kind}-{shard:05d}.ndjson.gz", "rt").read().splitlines()
            rows = [self.later(line, shard + 1) for line in map(parsed, lines) if "query_id" in line]
            rows = [row | changed(row) for row in rows]
            (self.folder / f"ubi_{kind}-{word}.ndjson").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        grades = pl.read_parquet(self.folder / "judgments-1.parquet").filter(pl.col("query").is_in(renamed))
        grades.with_columns(query=pl.format(f"{word} {{}}", "query")).write_parquet(
            self.folder / f"judgments-{word}.parquet"
        )
        if drift:
            known = pl.read_parquet(self.folder / "documents-1.parquet")
            known.with_columns(doc_id=pl.format("N{}", "doc_id")).write_parquet(self.folder / "documents-new.parquet")

    @staticmethod
    def document(doc_id: str, drift: bool) -> str:
        return f"N{doc_id}" if drift and int(doc_id[1:]) % 2 else doc_id

    @staticmethod
    def later(line: dict, months: int) -> dict:
        time = datetime.fromisoformat(line["timestamp"]) + timedelta(days=30 * months)
        names = {name: f"{months}-{line[name]}" for name in ("query_id", "client_id")}
        return line | names | {"timestamp": time.isoformat()}


def parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def scored_before(store: Store, folder: Path) -> Store:
    """A copy of the labels, to tell later which pairs were new."""
    shutil.copytree(store.at("labels"), folder / "labels")
    return Store(str(folder))


def new_pairs(content: dict, store: Store, before: Store) -> int:
    teacher = Teacher.of(recipe.parse(content), store)
    keys = [key for group in store.read("groups").to_pylist() for key, _, _ in teacher.keyed(group)]
    return len(Labels(before, teacher.name).missing(keys))


def weights(folder) -> dict:
    return {name: values.numpy() for name, values in load_file(Path(folder, "model.safetensors")).items()}


def state(*folders: Path) -> dict:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_3_days_score_only_what_is_new_go_on_from_the_last_student_and_tell_the_drift_of_the_third(
    ray_here, tiny, tiny_run, tmp_path, capsys
):
    # The first day: the pipeline's tables, teacher and labels; its bundle serves.
    root, bundles = Path(shutil.copytree(tiny_run.path, tmp_path / "run")), tmp_path / "run" / "bundles"
    store, shop = Store(str(root)), Shop(Path(tiny_run.at("world")), tmp_path / "logs")
    content = {name: value for name, value in tiny.items() if name != "world"}
    content |= {"root": str(root), "data": shop.data()}
    content["publish"] = tiny["publish"] | {"max_loss": 1.0, "int8": False, "bf16": False}
    pipeline.run(recipe.parse(content), last="sample")
    first = shutil.copytree(root / "bundle" / "student", bundles / "1")
    path = service(tmp_path, bundle=str(first))
    asked = [row["query"] for row in sorted(store.read("queries").to_pylist(), key=lambda row: -row["searches"])]

    # The second: a few queries are new.
    shop.day(0, "cheap", set(asked[-40:]))
    before = scored_before(store, tmp_path / "before-2")
    assert job.main(command(tmp_path, content, path, "2")) == 0, capsys.readouterr().err
    found, labels = store.read_json("refresh", "2", "refresh.json"), store.manifest("labels")["counts"]
    assert 0 < labels["scored"] == new_pairs(content, store, before) < labels["pairs"] / 2
    assert store.manifest("searches")["counts"]["files_read"] == 2
    assert found["drifted"] == [] and 0 < found["drift"][0]["value"] < 0.3
    check_matrix(found)
    check_start(content, store, first, bundles / "2", tmp_path / "start-2")
    served = job.serving(path)[1]
    canary = {"name": "refresh-2", "kind": "canary", "bundle": str(bundles / "2"), "share": 0.1}
    assert served == {"bundle": str(first), "experiment": canary}
    assert yaml.safe_load(path.read_text())["http_options"] == {"port": 8000}

    # Again: nothing happens, and nothing is paid for.
    left = state(root, tmp_path / "logs") | {path: path.read_bytes()}
    capsys.readouterr()
    assert job.main(command(tmp_path, content, path, "2")) == 0
    assert "refresh: stands, nothing is new since 2" in capsys.readouterr().out
    assert state(root, tmp_path / "logs") | {path: path.read_bytes()} == left

    # The third, after the canary was taken: most queries, half of the documents and the clicks are others.
    path = service(tmp_path, bundle=str(bundles / "2"))
    shop.day(1, "gift", {query for place, query in enumerate(asked) if place % 4}, drift=True)
    before = scored_before(store, tmp_path / "before-3")
    unchanged = path.read_bytes()
    assert job.main(command(tmp_path, content, path, "2")) == 2
    assert "2 is done, and log or settings changed since" in capsys.readouterr().err
    assert job.main(command(tmp_path, content, path, "3", "publish.max_difference=1e-30")) == 1
    assert "failed: publish: the student does not pass the gate" in capsys.readouterr().err
    assert path.read_bytes() == unchanged and not (bundles / "3").exists()
    assert job.main(command(tmp_path, content, path, "3")) == 0
    said = capsys.readouterr().out
    ran = [
        step.stage.name for step in stages.steps(recipe.parse(content)) if f"refresh: {step.stage.name}: runs" in said
    ]
    assert ran == ["publish"]  # what stood before the gate is not done again
    found, labels = store.read_json("refresh", "3", "refresh.json"), store.manifest("labels")["counts"]
    assert 0 < labels["scored"] == new_pairs(content, store, before) < labels["pairs"]
    assert found["drifted"] == ["max_new_queries", "max_new_documents", "max_position_shift"]
    assert "Drift: " in said and ">drift<" in store.read_bytes("refresh", "3", "refresh.html").decode()
    check_matrix(found)
    check_start(content, store, bundles / "2", bundles / "3", tmp_path / "start-3")
    assert job.serving(path)[1]["experiment"]["bundle"] == str(bundles / "3")
    assert bundle.digest(bundles / "2") != bundle.digest(bundles / "3")


def check_matrix(found: dict) -> None:
    """Both students on old and new queries; the numbers of all are the mean of those of the ages."""
    ages = {row["slice"]: row for row in found["matrix"] if row["by"] == "age"}
    assert ages["measured before"]["queries"] > 0 < ages["new today"]["queries"]
    assert {row["slice"] for row in found["agreement"]} >= {"all", "measured before", "new today"}
    whole = found["matrix"][0]
    assert list(whole["models"]) == ["bm25", "teacher", IN_SERVICE, NEW]
    for model in whole["models"]:
        parts = [row["queries"] * row["models"][model]["value"] for row in ages.values()]
        assert sum(parts) / whole["queries"] == pytest.approx(whole["models"][model]["value"])
    assert {row["by"] for row in found["matrix"]} == {"all", "age", "band", "query_words", "document_words"}


def check_start(content: dict, store: Store, start: Path, released: Path, folder: Path) -> None:
    """The student began with the weights in service, and its bundle says so; the teacher is none of tonight."""
    folder.mkdir()
    distill.start(refresh.nightly(recipe.parse(content), str(start)), store, folder)
    began, served, now = weights(folder), weights(start), weights(released)
    assert all(np.array_equal(began[name], served[name]) for name in served) and began.keys() == served.keys()
    assert any(not np.array_equal(now[name], served[name]) for name in served)
    chain = bundle.verify(released)["lineage"]
    assert str(start / "model.safetensors") in [file[0] for file in chain["student"]["files"]]
    assert chain["teacher"]["reads"] == {}
