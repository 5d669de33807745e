"""The student as a bundle, if it passes the gate."""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from disranker import bundle, card, conversion, gate, lineage, metrics, selftest, speed
from disranker.contract import Tokens
from disranker.engine import Engine
from disranker.gate import Bar
from disranker.metrics import Run
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import launch
from jobs.launch import Failed

BUNDLE = "bundle/student"  # beside the manifest of the stage: a bundle holds no file that it does not vouch for
CARD = ("searches", "documents", "groups", "teacher", "labels", "student")

Groups = Sequence[dict[str, Any]]


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg = recipe.publish
    found = store.read_json("report", "report.json")
    tested = speed.spread(store.read("groups", where=pc.field("split") == "test").to_pylist(), cfg.test_lists)
    with tempfile.TemporaryDirectory() as folder:
        assembled = _assemble(folder, recipe, store)
        names = speed.present(cfg.bf16, cfg.int8)
        runs = speed.runs(assembled, names, tested)
        measured = speed.agreement(metrics.judged(tested), runs)
        bars = [*gate.quality(found, cfg), *_in_service(recipe, tested, runs["torch"]), *gate.engines(measured, cfg)]
        _decide(bars, store)
        Path(assembled, bundle.SELFTEST).write_text(selftest.made(tested, runs).model_dump_json(indent=1))
        tokens = Tokens.load(assembled)
        timed = [tokens.listed(group["query"], group["docs"]) for group in tested[: cfg.timed_lists]]
        speeds = speed.measure(assembled, names, timed, cfg.timing_rounds)
        chosen = speed.choose(speeds)
        bundle.write(
            f"{folder}/bundle",
            assembled,
            name="disranker",
            report=found,
            facts=card.facts({name: store.manifest(name) for name in CARD}, recipe.made_up),
            engine=chosen,
            measured={name: speeds[name] | measured[name] for name in names},
            gate=gate.content(bars),
            chain=lineage.chain(store, step.reads, step.fingerprint, datetime.now(UTC).isoformat(), step.inputs),
        )
        store.put_folder(f"{folder}/bundle", BUNDLE)
    return {"gate": "passed", "engine": chosen, "engines": speeds}


def _assemble(folder: str, recipe: Recipe, store: Store) -> str:
    """A folder with all that a bundle is written from: the student, its engines, the pages of the report."""
    assembled = Path(folder) / "assembled"
    shutil.copytree(store.folder("student"), assembled)
    tokens = Tokens.load(assembled)
    prompts = [prompt for group in _trained(recipe, store) for prompt in tokens.listed(group["query"], group["docs"])]
    conversion.export(assembled, assembled, prompts if recipe.publish.int8 else None)
    for page in bundle.REPORT_FILES:
        (assembled / page).write_bytes(store.read_bytes("report", page))
    return str(assembled)


def _trained(recipe: Recipe, store: Store) -> Groups:
    """Some lists of the training split: the 8 bits must not be fitted to the lists that they are tested on."""
    found: list[dict[str, Any]] = []
    for part in range(recipe.ingest.parts):  # no more of them in memory than it takes
        if len(found) < recipe.publish.calibration_lists:
            found += store.read("groups", part=part, where=pc.field("split") == "train").to_pylist()
    return found[: recipe.publish.calibration_lists]


def _in_service(recipe: Recipe, tested: Groups, new: Run) -> list[Bar]:
    folder = recipe.publish.in_service
    if folder is None:
        return []
    # In float32 both, so that the bar is about the students.
    old = speed.run(Engine.from_bundle(folder, engine="torch"), tested)
    return [gate.in_service(metrics.judged(tested), new, old, recipe.publish, recipe.evaluate, recipe.seed)]


def _decide(bars: Sequence[Bar], store: Store) -> None:
    """Writes gate.json, says each bar, and raises `Failed` with all reasons where one is not passed."""
    store.put_text(json.dumps(gate.content(bars), indent=1), "report", "gate.json")
    for bar in bars:
        launch.say(f"publish: {bar.line}")
    if reasons := gate.reasons(bars):
        raise Failed("publish: the student does not pass the gate. " + " ".join(reasons))


if __name__ == "__main__":
    sys.exit(launch.main("publish"))
