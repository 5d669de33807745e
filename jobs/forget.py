"""Removes people from searches and evidence, and says which labels and models were made while they were in them.

The log files are not ours to change: they may still hold the person, and a later `ingest` passes over those lines.
"""

import sys
from pathlib import Path

from disranker import ledger, stages
from disranker import recipe as recipes
from disranker.ledger import Ledger
from disranker.recipe import Recipe, Refused
from disranker.store import Store
from jobs import ingest, launch

AGAIN = ("ingest", "aggregate")


def run(recipe: Recipe, store: Store, clients: list[str]) -> list[str]:
    """Forgets the clients and does `ingest` and `aggregate` again; the artefacts that still rest on them."""
    if store.finished("searches") is None:
        raise Refused(f"forget: no searches in {store.uri}; run jobs.ingest first")
    at = _ledger(recipe, store)
    if not at.batches:  # the run was moved, and with it the names of the files
        launch.execute(stages.step(recipe, "ingest"), recipe, store)
        at = _ledger(recipe, store)
    known = set(map(ledger.hashed, clients)) & set(at.forgotten)
    if not known and not at.lines_of(clients):
        raise Refused(f"forget: no line of {len(clients)} clients in {store.uri}; is the id written as in the log?")
    ledger.remember_to_forget(store, clients)  # first: from here on no log brings them back
    launch.say(f"forget: {len(clients)} clients, {at.forget(clients)} lines of theirs removed")
    for name in AGAIN:
        launch.execute(stages.step(recipe, name), recipe, store)
    return stages.resting(store)


def _ledger(recipe: Recipe, store: Store) -> Ledger:
    return Ledger(store, ingest.meaning(recipe, stages.step(recipe, "ingest")), recipe.ingest)


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.forget", __doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--client", action="append", default=[], help="the client's id as the log has it; may be repeated")
    who.add_argument("--clients", type=Path, help="a file with one id a line")
    arguments = parser.parse_args(argv)

    def work() -> None:
        recipe = recipes.load(arguments.recipe, arguments.set)
        rests = run(recipe, Store(recipe.root), _clients(arguments.client, arguments.clients))
        for artefact in rests:
            launch.say(f"forget: {artefact} was made while they were in the log; jobs.pipeline makes it anew")

    return launch.guarded(work)


def _clients(named: list[str], file: Path | None) -> list[str]:
    if file is None:
        return named
    try:
        found = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"forget: {file} cannot be read: {error}") from error
    if not found:
        raise Refused(f"forget: {file} names no client")
    return found


if __name__ == "__main__":
    sys.exit(main())
