"""Judgments, documents or scores of a run in the files of TREC, BEIR, OpenSearch's workbench, or as a plain table."""

import sys
from collections.abc import Iterator

import pyarrow as pa

from disranker import exports, lines, stages
from disranker import recipe as recipes
from disranker.recipe import Recipe, Refused, in_a_line
from disranker.store import Store
from jobs import launch
from jobs.launch import Failed, say

FORMS = sorted({form for forms in exports.FORMS.values() for form in forms})


def run(recipe: Recipe, what: str, form: str, to: str) -> None:
    source = Store(recipe.root)
    if source.finished(what) is None:
        maker = next(stage.name for stage in stages.STAGES if what in stage.writes)
        raise Refused(f"export: {what} is not there in {source.uri}; run jobs.{maker} first, or jobs.pipeline")
    if to.endswith(lines.COMPRESSED):
        raise Refused(f"--to {to}: files are written plain; leave out the last ending")
    files = exports.files(what, form, _parts(source, what))
    try:
        for name, write in files.items():
            place = (name,) if name else ()
            Store(to).put(write, *place)
            say("/".join((f"export: {what} -> {to}", *place)))
    except OSError as error:
        raise Failed(f"export: {to} cannot be written: {in_a_line(error)}") from error


def _parts(source: Store, what: str) -> Iterator[pa.Table]:
    return (source.read_files(what, [part]) for part in source.parts(what))


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.export", __doc__)
    parser.add_argument("--what", required=True, choices=list(exports.FORMS))
    parser.add_argument("--format", required=True, choices=FORMS)
    parser.add_argument("--to", required=True, help="a folder for trec and beir, else a file: a path or URI")
    arguments = parser.parse_args(argv)

    def work() -> None:
        recipe = recipes.load(arguments.recipe, arguments.set)
        run(recipe, arguments.what, arguments.format, arguments.to)

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
