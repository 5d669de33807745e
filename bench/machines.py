"""Nodes that are processes of this host: what runs on each is told by its environment."""

from contextlib import suppress
from pathlib import Path

import psutil

from bench.endpoints import environment

MARK = "DISRANKER_NODE"  # of the environment of what runs on a node: its home
LOOK = ("environ", "status", "name", "cmdline")  # seen of a process at once: a moment later it may be gone


def apart(home: Path) -> dict[str, str]:
    """The environment of a machine of its own, with this project installed: nothing of the Ray around it.

    LD_PRELOAD is of it too: Ray's processes have an allocator by it that its workers must not have.
    """
    kept = {name: value for name, value in environment().items() if not name.startswith(("RAY_", "LD_PRELOAD"))}
    return kept | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}


def said(process: psutil.Process) -> str:
    """Its command line, which a worker of Ray replaces by what it works at."""
    return " ".join(process.info["cmdline"] or [])


def processes(home: Path) -> list[psutil.Process]:
    """All that run on a node; `info` has name and command line, also of one that ends meanwhile."""
    alive = (each for each in psutil.process_iter(LOOK) if each.info["status"] != psutil.STATUS_ZOMBIE)
    return [each for each in alive if (each.info["environ"] or {}).get(MARK) == str(home)]


def end(home: Path) -> None:
    """SIGKILL for all of a node, until none is left: one may have started another meanwhile."""
    while alive := processes(home):
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, 5)
