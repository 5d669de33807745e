"""From a bundle back to the log files: which artefact was made of which, by the digests of their manifests."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from disranker.inputs import Settings
from disranker.recipe import Refused
from disranker.store import MANIFEST, Store

ROOT = "bundle"


class Node(Settings):
    """An artefact of the chain."""

    fingerprint: str  # of the stage that made it, from its settings and all that it read
    manifest: str | None  # sha256 of its manifest.json; None of the bundle, which has none yet
    finished: str  # ISO 8601, UTC
    counts: dict[str, int]  # rows, and the plain counts that the stage said
    reads: dict[str, str]  # artefact -> its fingerprint
    files: list[list[Any]]  # from outside: [path, bytes, ...]; of what reads nothing and made all: its own
    rests_on_forgotten: list[str]  # made before somebody was forgotten, and not since


Chain = dict[str, Node]


def chain(store: Store, reads: Mapping[str, str], fingerprint: str, made: str, files: list[list[Any]]) -> Chain:
    """All that a bundle rests on, itself first, each artefact before those that it reads.

    `reads`, `fingerprint`, `files` are those of the step that makes the bundle, `made` its time. Raises `Refused` where
    an artefact is not there, or is not the one that was read.
    """
    found = {
        ROOT: Node(
            fingerprint=fingerprint,
            manifest=None,
            finished=made,
            counts={},
            reads=dict(reads),
            files=files,
            rests_on_forgotten=[],
        )
    }
    wanted = [(ROOT, name, print_) for name, print_ in reads.items()]
    while wanted:
        reader, name, expected = wanted.pop(0)
        if name not in found:
            found[name] = _node(store, name)
            wanted += [(name, *read) for read in found[name].reads.items()]
        if found[name].fingerprint != expected:
            raise Refused(
                f"{store.uri}: {reader} was made of {name} {expected}, but there lies {found[name].fingerprint}; "
                "run jobs.pipeline"
            )
    return found


def check(found: Chain, store: Store) -> None:
    """Raises `Refused` where an artefact of the chain lies in the store with another manifest, or none."""
    for name, node in found.items():
        if node.manifest is not None and (here := _digest(store, name)) != node.manifest:
            raise Refused(f"{store.uri}: manifest of {name}: sha256 expected {node.manifest}, found {here or 'none'}")


def tree(found: Chain, name: str = ROOT) -> Iterator[str]:
    """The chain as lines of text: artefact, fingerprint, when it was finished, counts, and the files below.

    An artefact that several were made of stands in full where it comes first.
    """
    yield from _branch(found, name, set(), "", "")


def log_files(found: Chain) -> list[list[Any]]:
    """The files at the ends of the chain, each once."""
    return sorted({file[0]: file for name, node in found.items() if name != ROOT for file in node.files}.values())


def _node(store: Store, name: str) -> Node:
    manifest = store.finished(name)
    if manifest is None:
        raise Refused(f"{store.uri}: {name} is not there, so the bundle cannot say what it was made of")
    reads, files = manifest["reads"], manifest["inputs"]
    if not reads and not files:  # the made-up world
        files = [[info.path.removeprefix(store.at("")), info.size] for info in store.files(name)]
        files = sorted(file for file in files if not file[0].endswith(MANIFEST))
    rows = {"rows": manifest["rows"]} if "rows" in manifest else {}
    return Node(
        fingerprint=manifest["fingerprint"],
        manifest=_digest(store, name),
        finished=manifest["finished"],
        counts=rows | {count: value for count, value in manifest["counts"].items() if type(value) is int},
        reads=reads,
        files=files,
        rests_on_forgotten=manifest.get("rests_on_forgotten", []),
    )


def _digest(store: Store, name: str) -> str | None:
    try:
        return hashlib.sha256(store.read_bytes(name, MANIFEST)).hexdigest()
    except FileNotFoundError:
        return None


def _branch(found: Chain, name: str, told: set[str], first: str, others: str) -> Iterator[str]:
    node = found[name]
    if name in told:
        yield f"{first}{name}  {node.fingerprint}  (above)"
        return
    told.add(name)
    counts = ", ".join(f"{count} {value:,}" for count, value in node.counts.items())
    yield f"{first}{name}  {node.fingerprint}  {node.finished}  {counts}".rstrip()
    if node.rests_on_forgotten:
        yield f"{others}   made before somebody was forgotten, from {', '.join(node.rests_on_forgotten)}"
    leaves = [f"{file[0]}  {file[1]:,} bytes" for file in node.files]
    for place, below in enumerate([*node.reads, *leaves], 1):
        last = place == len(node.reads) + len(leaves)
        one, more = others + ("└─ " if last else "├─ "), others + ("   " if last else "│  ")
        if place > len(node.reads):
            yield one + below
        else:
            yield from _branch(found, below, told, one, more)
