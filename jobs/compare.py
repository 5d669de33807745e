"""The reports of two runs side by side, and the settings that differ."""

import argparse
import sys
from typing import Any
from urllib.parse import unquote

from disranker import comparison, lines, stages, trec
from disranker.comparison import Side
from disranker.recipe import Refused, in_a_line
from disranker.store import Store
from jobs import launch
from jobs.launch import Failed, say


def run(a: str, b: str, out: str | None = None) -> None:
    one, other = side(a), side(b)
    print(comparison.table(one, other), flush=True)
    if out is None:
        return
    if out.endswith(lines.COMPRESSED):
        raise Refused(f"--out {out}: files are written plain; leave out the last ending")
    try:
        Store(out).put_text(comparison.html(one, other))
    except OSError as error:
        raise Failed(f"compare: {out} cannot be written: {in_a_line(error)}") from error
    say(f"compare: {out}")


def side(root: str) -> Side:
    """What a run left of its evaluation. Raises `Refused` where it has no report."""
    store = Store(root)
    if store.finished("report") is None:
        raise Refused(f"compare: no report in {store.uri}; run jobs.evaluate first, or jobs.pipeline")
    found = store.read_json("report", "report.json")
    names = [info.base_name for info in store.files("report")]
    qrels = trec.qrels(f"{store.uri}/report/qrels.txt") if "qrels.txt" in names else {}
    runs = {
        unquote(name.removesuffix(".run")): trec.run(f"{store.uri}/report/{name}")
        for name in names
        if name.endswith(".run")
    }
    return Side(store.uri, found, qrels, runs, _settings(store) | {"recipe": {"seed": found.get("seed")}})


def _settings(store: Store) -> dict[str, Any]:
    """Section -> setting -> value, of the stages whose results lie there, and the versions that made the report."""
    artefacts = [name for stage in stages.STAGES for name in stage.writes]
    manifests = [manifest for name in artefacts if (manifest := store.finished(name))]
    found = {section: values for manifest in manifests for section, values in manifest["settings"].items()}
    return found | {"version": store.manifest("report")["versions"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description=__doc__)
    parser.add_argument("a", metavar="ROOT_A", help="root of a run: a path or URI")
    parser.add_argument("b", metavar="ROOT_B", help="root of another")
    parser.add_argument("--out", metavar="FILE.html", help="write the comparison as a page, too")
    arguments = parser.parse_args(argv)
    return launch.guarded(lambda: run(arguments.a, arguments.b, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
