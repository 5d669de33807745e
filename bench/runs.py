"""Jobs in processes of their own, their kills, and what they left: shared by the measurements and the tests.

Only processes are ended that the caller started, or that stand below them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow.parquet as pq
import yaml

from jobs.watch import Watch

ROOT = Path(__file__).parents[1]
LOOK_EVERY_S = 0.01
Found = TypeVar("Found")


class Broken(RuntimeError):
    """A process that ended, or did not end, otherwise than the measurement needs."""


# Processes


def job(
    recipe: Path, log: Path, ray: str = "", stage: str = "score", options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """`python -m jobs.<stage>` in a session of its own; without an address it starts a Ray of its own."""
    command = [sys.executable, "-m", f"jobs.{stage}", "--recipe", str(recipe), *options]
    with log.open("ab") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=_environment() | {"RAY_ADDRESS": ray}, stdout=out, stderr=out, start_new_session=True
        )


def done(
    recipe: Path,
    log: Path,
    ray: str = "",
    timeout_s: float = 3600,
    stage: str = "score",
    artefact: str = "labels",
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest of an artefact after a run of its stage to its end. Raises `Broken` if it fails."""
    process = job(recipe, log, ray, stage, options)
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise Broken(f"jobs.{stage} has not ended in {timeout_s:.0f} s: {_tail(log)}") from error
    finally:
        end(process)
    if status:
        raise Broken(f"jobs.{stage} ended with {status}: {_tail(log)}")
    manifest: dict[str, Any] = json.loads((root(recipe) / artefact / "manifest.json").read_text())
    return manifest


def measured(module: str, *arguments: Any) -> dict[str, Any]:
    """What `python -m <module>` says in its last line. Raises `Broken` if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if run.returncode:
        raise Broken(f"{' '.join(command)} ended with {run.returncode}: {run.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return said


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that stands below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for each in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def end_on_sigterm() -> None:
    """From here on SIGTERM ends this process as Ctrl-C does: with all that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def workers(roots: Iterable[int], word: str) -> list[psutil.Process]:
    """The Ray workers below the given processes with a word in their title, which names class and function."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [each for each in psutil.Process(root).children(recursive=True) if _is_worker(each, word)]
    return found


def until(
    what: Callable[[], Found],
    process: subprocess.Popen[bytes] | None,
    timeout_s: float = 600,
    every_s: float = LOOK_EVERY_S,
) -> Found:
    """The first answer that is not empty. Raises `Broken` when the process ends before, or the time is over."""
    over = time.monotonic() + timeout_s
    while not (answer := what()):
        if process and process.poll() is not None:
            raise Broken(f"the job ended with {process.returncode} before it was due")
        if time.monotonic() > over:
            raise Broken(f"it was not there in {timeout_s:.0f} s")
        time.sleep(every_s)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_worker(process: psutil.Process, word: str) -> bool:
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())
        return title.startswith("ray::") and word in title
    return False


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "HF_HUB_OFFLINE": "1"}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


# Labels


def root(recipe: Path) -> Path:
    """The folder of a recipe's run."""
    return Path(yaml.safe_load(recipe.read_text())["root"])


def labels(recipe: Path) -> Path:
    """The folder of all labels of a recipe's store."""
    return root(recipe) / "labels"


Row = tuple[str, float]


def rows(folder: Path) -> list[Row]:
    """Key and score of every row in every parquet file below a folder, finished or not."""
    found: list[Row] = []
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path, columns=["key", "score"])
        found += zip(table["key"].to_pylist(), table["score"].to_pylist(), strict=True)
    return found


@dataclass(frozen=True)
class Difference:
    """Of labels from those of an undisturbed run."""

    keys_wrong: int  # there, and not in the undisturbed run
    doubled: int  # rows more than keys
    missing: int
    most_difference: float  # of the scores of one key


def compare(mine: Sequence[Row], undisturbed: Sequence[Row]) -> Difference:
    wanted, scores = dict(undisturbed), dict(mine)
    return Difference(
        keys_wrong=len(scores.keys() - wanted.keys()),
        doubled=len(mine) - len(scores),
        missing=len(wanted.keys() - scores.keys()),
        most_difference=max((abs(score - wanted[key]) for key, score in mine if key in wanted), default=0.0),
    )


def worst(differences: Sequence[Difference]) -> dict[str, Any]:
    """The largest of each."""
    return {name: max(getattr(each, name) for each in differences) for name in Difference.__dataclass_fields__}


class Written(Watch):
    """Counts pairs by every version of every batch file that appears in a folder of labels while it is open.

    A batch that is scored again replaces its file, so neither the files at the end nor the counts of a run show it.
    """

    every_s = LOOK_EVERY_S

    def __init__(self, folder: Path):
        self.pairs = 0
        self._folder = folder
        self._seen: set[tuple[str, int, int]] = set()

    def look(self) -> None:
        """Counts what is new. A file that is compacted away at this very moment is not counted."""
        for path in self._folder.glob("*/new-*.parquet"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                version = (path.name, state.st_ino, state.st_mtime_ns)
                if version not in self._seen:
                    self.pairs += pq.read_metadata(path).num_rows
                    self._seen.add(version)
