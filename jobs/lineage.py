"""What a bundle was made of, as a tree from the bundle to the log files."""

import argparse
import sys

from disranker import bundle, lineage
from disranker.store import Store
from jobs import launch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.lineage", description=__doc__)
    parser.add_argument("bundle", help="folder of a bundle")
    parser.add_argument("--root", help="of the run that made it: checks that its artefacts are still the same")
    arguments = parser.parse_args(argv)

    def work() -> None:
        chain = {name: lineage.Node(**node) for name, node in bundle.verify(arguments.bundle)["lineage"].items()}
        for line in lineage.tree(chain):
            print(line)
        if arguments.root:
            lineage.check(chain, Store(arguments.root))

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
