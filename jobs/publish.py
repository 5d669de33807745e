"""The student as a bundle, if it passes the gate."""

import sys
import tempfile
from typing import Any

from disranker import bundle, report
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import launch
from jobs.launch import Failed

BUNDLE = "bundle/student"  # beside the manifest of the stage: a bundle holds no file that it does not vouch for


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    with store.fs.open_input_stream(store.at("report", "report.json")) as file:
        found = report.read(file.read())
    reasons = report.gate(found, recipe.publish)
    if reasons:
        raise Failed("publish: the student does not pass the gate. " + " ".join(reasons))
    facts = {
        "teacher": recipe.teacher.base,
        "student": f"{recipe.student.base}, {recipe.student.layers} layers",
        "labels": f"{store.manifest('labels')['counts']['pairs']:,} pairs",
        "data": "a made-up world" if recipe.made_up else "click logs",
        "fingerprint": step.fingerprint,
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(folder, store.folder("student"), name="disranker", report=found, facts=facts)
        store.put_folder(folder, BUNDLE)
    return {"gate": "passed"}


if __name__ == "__main__":
    sys.exit(launch.main("publish"))
