"""All stages in order, from a click log to a bundle; what stands is skipped."""

import sys

from disranker import recipe as recipes
from disranker import stages
from disranker.recipe import Recipe
from disranker.store import Store
from jobs import launch
from jobs.launch import say


def run(recipe: Recipe, first: str | None = None, last: str | None = None, dry: bool = False) -> None:
    """Runs what has to run from stage `first`, which is done again in any case, to stage `last`."""
    store = Store(recipe.root)
    chosen = stages.select(stages.steps(recipe), first, last)
    again = f"--from {first}" if first else None
    remade: set[str] = set()
    for place, step in enumerate(chosen, start=1):
        reason = again or stages.why(step, store) or (dry and remade & set(step.reads) and "what it reads is made anew")
        say(f"[{place}/{len(chosen)}] {step.stage.name}: " + (f"runs, {reason}" if reason else "stands"))
        remade |= set(step.stage.writes) if reason else set()
        if reason and not dry:
            launch.execute(step, recipe, store)


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.pipeline", __doc__)
    parser.add_argument("--from", dest="first", metavar="STAGE", help="do this stage and all after it again")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and run nothing")
    arguments = parser.parse_args(argv)

    def work() -> None:
        run(recipes.load(arguments.recipe, arguments.set), arguments.first, arguments.last, arguments.dry_run)

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
