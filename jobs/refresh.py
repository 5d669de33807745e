"""A night: new log files -> only new pairs scored -> a student that goes on from the one in service -> gate -> canary.

The teacher is not trained again. What the night changed stands in root/refresh/DAY: where the new student is better or
worse than the one in service, and whether the day's log is like those before.
"""

import json
import re
import shutil
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.compute as pc
import yaml

from disranker import bundle, lineage, metrics, refresh, slices, speed, stages
from disranker import recipe as recipes
from disranker.engine import Engine
from disranker.metrics import Run
from disranker.recipe import Recipe, Refused, digest, in_a_line
from disranker.stages import Step
from disranker.store import MANIFEST, Store
from jobs import evaluate, launch, parts, publish
from jobs.launch import Failed, say
from jobs.score import Teacher
from serve.settings import Served

DAYS = "refresh"  # beside the tables, a folder for each day
FIRST = "_pipeline"  # stands for the days before the first night
SEEN = "seen.parquet"  # what the log held when a night ended
MEASURED = "measured"  # beside what the log held: the queries of test and validation lists
SPLITS = ("test", "validation")
DAY = "[A-Za-z0-9][A-Za-z0-9._-]{0,49}"  # names a folder and an experiment
OURS = "refresh-"  # begins the names of the experiments that a night may replace
SERVE = Path(sys.executable).with_name("serve")

Row = dict[str, Any]


@dataclass(frozen=True)
class Night:
    """What the command line asks for."""

    day: str
    service: Path  # the Serve config
    bundles: Path  # folder of the dated ones
    deploy: str | None = None  # address of a dashboard


def run(recipe: Recipe, night: Night) -> None:
    store, (config, served) = Store(recipe.root), serving(night.service)
    teacher = _teacher(recipe, store)
    asked = digest([stages.step(recipe, "ingest").fingerprint, recipe.model_dump()])
    last = _last(store)
    if last and last["asked"] == asked:
        say(f"refresh: stands, nothing is new since {last['day']}; to deploy it: serve deploy {night.service}")
        return
    if store.finished(f"{DAYS}/{night.day}"):
        raise Refused(f"refresh: {night.day} is done, and log or settings changed since; name another --day")
    bundle.verify(served["bundle"])
    launch.connect()
    last = last or _first(store)
    tonight = refresh.nightly(recipe, served["bundle"])
    *steps, gate = refresh.steps(tonight, teacher)
    for step in steps:
        _step(step, tonight, store)
    counts = _look_back(tonight, store, night.day, last["day"])
    _step(gate, tonight, store)
    released = _release(store, night.bundles / night.day)
    _canary(config, served, night, released, recipe.refresh.share)
    _commit(store, night.day, asked, counts)


def _step(step: Step, recipe: Recipe, store: Store) -> None:
    reason = stages.why(step, store)
    say(f"refresh: {step.stage.name}: " + (f"runs, {reason}" if reason else "stands"))
    if reason:
        launch.execute(step, recipe, store)


def _teacher(recipe: Recipe, store: Store) -> str:
    """The fingerprint of the teacher that stands.

    The tables that it was trained on will change: from now on its manifest names the files that they came from.
    """
    if recipe.made_up:
        raise Refused("refresh: the made-up world has no second day; name log files under data")
    manifest = store.finished("teacher")
    if manifest is None or store.finished("searches") is None:
        raise Refused(f"refresh: no teacher in {store.uri}; run jobs.pipeline first")
    fingerprint: str = manifest["fingerprint"]
    if manifest["reads"]:
        files: list[list[Any]] = []
        with suppress(Refused):  # some of the tables changed already: the teacher alone is where its chain ends
            chain = lineage.chain(store, manifest["reads"], fingerprint, manifest["finished"], [])
            files = [*manifest["inputs"], *lineage.log_files(chain)]
        kept = manifest | {"reads": {}, "inputs": files, "trained_on": manifest["reads"]}
        store.put_text(json.dumps(kept, indent=1), "teacher", MANIFEST)
    return fingerprint


# What each night remembers


def _last(store: Store) -> Row | None:
    """What the last finished night left, or the first one found."""
    manifests = [info.path for info in store.files(DAYS) if info.base_name == MANIFEST]
    found = [store.read_json(path.removeprefix(store.at(""))) for path in manifests]
    return max(found, key=lambda one: one["finished"], default=None)


def _first(store: Store) -> Row:
    """Before the first night: what the tables hold as the pipeline left them."""
    store.put_table(_seen(store).to_arrow(), DAYS, FIRST, SEEN)
    _commit(store, FIRST, "", {})
    return store.manifest(f"{DAYS}/{FIRST}")


def _commit(store: Store, day: str, asked: str, counts: Row) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    store.commit(f"{DAYS}/{day}", {"day": day, "asked": asked, "finished": now, "counts": counts})


def _seen(store: Store) -> pl.DataFrame:
    """What the log holds, as `refresh.seen`, and the queries that are measured."""
    files = store.parts("searches")

    def count(number: int) -> dict[str, Any]:
        return {"seen": refresh.seen(store.read_files("searches", [files[number]]))}

    lists = store.read("groups", ["query"], where=pc.field("split") != "train")
    measured = refresh.named(MEASURED, pl.Series(lists["query"].to_pylist(), dtype=pl.String))
    return refresh.added([*(said["seen"] for said in parts.each(len(files), count)), measured])


def _look_back(recipe: Recipe, store: Store, day: str, last: str) -> Row:
    """Writes what the night changed, before the gate: who is refused sees why. Gives the counts."""
    now, before = _seen(store), pl.read_parquet(store.read_bytes(DAYS, last, SEEN))
    today = refresh.since(now, before)
    known, searched = (set(before.filter(pl.col("what") == what)["name"]) for what in (MEASURED, "query"))
    runs = _runs(recipe, store)
    tested, others = (store.read("groups", where=pc.field("split") == split).to_pylist() for split in SPLITS)
    qrels, orders = metrics.judged(tested), refresh.orders(others, Teacher.of(recipe, store).scores(others))
    students = {model: runs[model] for model in (refresh.IN_SERVICE, refresh.NEW)}
    given = (recipe.evaluate, recipe.seed)
    cut = {"age": refresh.by_age(qrels, known, searched)} | evaluate.sliced(tested, store)
    by_grades = refresh.matrix(qrels, refresh.graded(qrels, runs), cut, *given)
    cut = {"age": refresh.by_age(orders, known, searched), "query_words": slices.by_words(orders)}
    by_teacher = refresh.matrix(orders, refresh.taught(orders, students), cut, *given, refresh.AGREEMENT)
    counts = _counts(store, today, recipe.student.base)
    since = "the pipeline's log and the student in service" if last == FIRST else f"{last} and the student in service"
    found = refresh.content(day, since, counts, refresh.drift(today, before, recipe.refresh), by_grades, by_teacher)
    store.put_table(now.to_arrow(), DAYS, day, SEEN)
    store.put_text(json.dumps(found, indent=1), DAYS, day, "refresh.json")
    store.put_text(refresh.html(found, recipe.evaluate), DAYS, day, "refresh.html")
    for _, sentence in refresh.sentences(found):
        say(f"refresh: {sentence}")
    say(f"refresh: {store.uri}/{DAYS}/{day}/refresh.html")
    return counts


def _counts(store: Store, today: pl.DataFrame, start: str) -> Row:
    labels, student = (store.manifest(name)["counts"] for name in ("labels", "student"))
    measured = student["validations"]
    return {
        "log files read": store.manifest("searches")["counts"]["files_read"],
        "searches of the day": int(today.filter(pl.col("what") == "query")["shown"].sum()),
        "pairs": labels["pairs"],
        "pairs scored": labels["scored"],
        "student starts from": f"{start} ({bundle.digest(start)})",
        "steps": student["steps"],
        "agreement with the teacher at the start": measured[0].get("teacher_pair_accuracy") if measured else None,
        "agreement with the teacher": student.get("teacher_pair_accuracy"),
    }


class Students:
    """Scores the lists of one part that nothing is learned from with both students, in float32."""

    def __init__(self, store: Store, in_service: str):
        old, new = Engine.from_bundle(in_service, engine="torch"), Engine(store.folder("student"))
        self.store, self.engines = store, {refresh.IN_SERVICE: old, refresh.NEW: new}

    def __call__(self, part: int) -> Row:
        groups = self.store.read("groups", part=part, where=pc.field("split") != "train").to_pylist()
        return {name: speed.run(engine, groups) for name, engine in self.engines.items()}


def _runs(recipe: Recipe, store: Store) -> dict[str, Run]:
    found: dict[str, dict[str, dict[str, float]]] = {"bm25": {}, "teacher": {}, refresh.IN_SERVICE: {}, refresh.NEW: {}}
    for row in store.read("scores", where=pc.field("model") != "student").to_pylist():
        found[row["model"]].setdefault(row["query"], {})[row["doc_id"]] = row["score"]
    for said in parts.each_by(recipe.ingest.parts, Students, store, recipe.student.base):
        for model, run in said.items():
            found[model] |= run
    return found


# The release


def _release(store: Store, folder: Path) -> Path:
    """The bundle under the name of its day, whole or not there."""
    made = store.folder(publish.BUNDLE)
    if folder.exists():
        if bundle.digest(folder) != bundle.digest(made):
            raise Refused(f"refresh: {folder} is there already, and is another bundle; name another --day")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    shutil.copytree(made, part)
    part.rename(folder)
    return folder


def serving(path: Path) -> tuple[Row, Row]:
    """A Serve config, and within it the `user_config` of the one deployment that serves a bundle.

    Raises `Refused` where there is none, or where it tries a candidate that no night put there.
    """
    try:
        config = yaml.safe_load(path.read_text())
        listed = [one for application in config["applications"] for one in application.get("deployments") or []]
        found = [one["user_config"] for one in listed if "bundle" in (one.get("user_config") or {})]
    except OSError as error:
        raise Refused(f"refresh: {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f"refresh: {path} is no Serve config ({in_a_line(error)})") from error
    if len(found) != 1:
        raise Refused(f"refresh: {path}: {len(found)} deployments have user_config.bundle; one must")
    candidate = Served.checked(found[0]).experiment
    if candidate and not candidate.name.startswith(OURS):
        raise Refused(f"refresh: {path} tries experiment {candidate.name}; end it before a night puts in its own")
    return config, found[0]


def _canary(config: Row, served: Row, night: Night, released: Path, share: float) -> None:
    """Puts the candidate into the Serve config, which is replaced whole or not at all, and deploys it if asked."""
    wanted = {"name": OURS + night.day, "kind": "canary", "bundle": str(released), "share": share}
    if served.get("experiment") != wanted:
        served["experiment"] = wanted
        Served.checked(served)
        part = night.service.with_name(f".{night.service.name}.{uuid.uuid4().hex}.part")
        part.write_text(yaml.safe_dump(config, sort_keys=False))
        shutil.copymode(night.service, part)
        part.replace(night.service)
    if night.deploy is None:
        say(f"refresh: {released.name} stands as canary in {night.service}; to deploy it: serve deploy {night.service}")
        return
    command = [SERVE, "deploy", night.service, "--address", night.deploy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise Failed(f"refresh: serve deploy {night.service}: {told[-1] if told else f'status {done.returncode}'}")
    say(f"refresh: {released.name} is deployed as canary for {share:.0%} of the clients")


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.refresh", __doc__)
    parser.add_argument("--service", required=True, type=Path, metavar="CONFIG.yaml", help="the Serve config to change")
    parser.add_argument("--day", default=f"{datetime.now(UTC):%Y-%m-%d}", help="name of the night; else the date, UTC")
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="of the dated bundles; else root/bundles")
    parser.add_argument("--deploy", metavar="ADDRESS", help="also `serve deploy` there: http://HOST:8265 of a cluster")
    arguments = parser.parse_args(argv)

    def work() -> None:
        recipe = recipes.load(arguments.recipe, arguments.set)
        if not re.fullmatch(DAY, arguments.day):
            raise Refused(f"--day {arguments.day}: up to 50 letters, digits, dots, dashes and underscores")
        if not (bundles := arguments.bundles) and not Store(recipe.root).local:
            raise Refused(f"refresh: {recipe.root} is no folder that replicas can read; name one with --bundles")
        folder = Path(bundles or Store(recipe.root).at("bundles")).absolute()
        run(recipe, Night(arguments.day, arguments.service, folder, arguments.deploy))

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
