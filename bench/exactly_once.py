"""SIGKILL in the middle of the stage `score`, then the same command again; or two jobs at once: the labels of one run.

Four things die: the driver, the Ray actor that holds the engine, the engine, and the raylet of the node they run on.
The jobs join a cluster of this process: a head that takes no work, and two nodes that do.

Pairs paid for twice are counted from outside, by every version of every batch file that ever appeared. To that comes
what no file shows: the batch in flight of each engine, which is scored and lost when the kill falls before its file.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import claims, made_up, runs
from bench.claims import Line
from bench.runs import Difference, Row
from disranker import recipe as recipes

KINDS = ("driver", "actor", "engine", "node")
TWO = "two"  # jobs at once, on one store
ALL = (*KINDS, TWO)
WORKERS, CPUS = 2, 2  # nodes, and what each offers: an engine and the reading beside it
SCORER = "Scorer"  # in the title of the actor
MOST_DIFFERENCE, MOST_TWICE = 1e-5, 0.05


@dataclass(frozen=True)
class Scoring:
    """What is disturbed: a made-up store, and the labels of its undisturbed run."""

    recipe: Path
    log: Path
    undisturbed: list[Row]
    batch: int
    engines: int
    batch_s: float


@dataclass(frozen=True)
class Kill:
    """What one kill did."""

    moment: float  # share of the pairs that were written by then
    difference: Difference
    seen_twice: float  # share of the pairs whose score was written again
    paid_twice: float  # with the batches in flight
    survived: bool  # the job, without the same command again


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` below this process, ended at the end."""
    from ray.cluster_utils import Cluster

    # The default ports may belong to another Ray of this machine.
    ports = {"dashboard_port": runs.free_port(), "dashboard_agent_listen_port": runs.free_port()}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | ports)
    try:
        for _ in range(WORKERS):
            made.add_node(num_cpus=CPUS)
        yield made
    finally:
        made.shutdown()


def raylets(made: Any) -> dict[int, Any]:
    """The nodes of a cluster that take work, by the process of their raylet."""
    return {node.all_processes["raylet"][0].process.pid: node for node in made.worker_nodes}


def undisturbed(recipe: Path, address: str) -> Scoring:
    """Runs the job once to its end."""
    log = recipe.with_name("log")
    counts = runs.done(recipe, log, address)["counts"]
    cfg = recipes.load(recipe).score
    batch_s = counts["scoring_s"] * cfg.pairs_per_batch / counts["pairs"]
    return Scoring(recipe, log, runs.rows(runs.labels(recipe)), cfg.pairs_per_batch, cfg.actors, batch_s)


def disturb(kind: str, scoring: Scoring, made: Any, rng: random.Random, timeout_s: float = 600) -> Kill:
    """Kills one thing at a random moment of the scoring, runs the same command again, and compares."""
    folder = runs.labels(scoring.recipe)
    shutil.rmtree(folder, ignore_errors=True)
    with runs.Written(folder) as written:
        survived, moment = killed_once(kind, scoring, made, written, rng, timeout_s)
        there = 0 if survived else len(dict(runs.rows(folder)))
        counts = runs.done(scoring.recipe, scoring.log, made.address, timeout_s)["counts"]
    mend(made)
    # A batch file that came and went unseen still shows in what the runs told, and the other way round.
    twice = max(counts["scored"] + there, written.pairs) - len(scoring.undisturbed)
    shares = [lost / len(scoring.undisturbed) for lost in (twice, twice + scoring.batch * scoring.engines)]
    return Kill(moment, runs.compare(runs.rows(folder), scoring.undisturbed), *shares, survived)


def killed_once(
    kind: str, scoring: Scoring, made: Any, written: runs.Written, rng: random.Random, timeout_s: float
) -> tuple[bool, float]:
    """Whether a job came to a good end although one thing was killed under it, and after which share of its pairs.

    Raises `Broken` where all pairs were written before.
    """
    share, batches = rng.uniform(0.0, 0.8), rng.random()
    dying = {worker.pid for worker in runs.workers(raylets(made), SCORER)}  # of the job before
    job = runs.job(scoring.recipe, scoring.log, made.address)
    try:
        # Looking through all processes costs time that an engine needs to start.
        actor = runs.until(lambda: scorer(made, dying), job, timeout_s, every_s=0.5)
        runs.until(lambda: written.pairs > share * len(scoring.undisturbed), job, timeout_s)
        time.sleep(batches * scoring.batch_s)
        kill(kind, job.pid, actor, made)
        moment = written.pairs / len(scoring.undisturbed)
        if moment >= 1:
            raise runs.Broken("all was scored before the kill: take more pairs, or smaller batches")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout_s)
    finally:
        runs.end(job)
    return job.returncode == 0, moment


def scorer(made: Any, dying: Collection[int] = ()) -> psutil.Process | None:
    """The process of the actor that scores, other than those."""
    return next((found for found in runs.workers(raylets(made), SCORER) if found.pid not in dying), None)


def engine(actor: psutil.Process) -> psutil.Process:
    """The process of the engine: one below the actor, or the actor itself where vLLM runs in it."""
    below = actor.children(recursive=True)
    return next((found for found in below if " ".join(found.cmdline()).startswith("VLLM::")), actor)


def kill(kind: str, driver: int, actor: psutil.Process, made: Any) -> None:
    """SIGKILL for one of the four."""
    raylet = actor.ppid()
    victims = {"driver": driver, "actor": actor.pid, "engine": engine(actor).pid, "node": raylet}
    os.kill(victims[kind], signal.SIGKILL)
    if kind == "node":  # the rest of the node dies with it, and the cluster forgets it
        made.remove_node(raylets(made)[raylet], allow_graceful=False)


def mend(made: Any) -> None:
    """Brings a cluster back to its number of nodes."""
    for _ in range(WORKERS - len(made.worker_nodes)):
        made.add_node(num_cpus=CPUS)


def line(kind: str, kills: Sequence[Kill], scoring: Scoring) -> Line:
    """The worst of all kills of one kind."""
    said = {"claim": f"exactly once: {kind} killed", "times": len(kills), "pairs": len(scoring.undisturbed)}
    said |= {"pairs_per_batch": scoring.batch, "survived": sum(each.survived for each in kills)}
    said |= {"moments": [claims.shown(each.moment) for each in kills]}
    said |= runs.worst([each.difference for each in kills])
    said |= {"most_seen_twice_share": claims.shown(max(each.seen_twice for each in kills))}
    said |= {"most_paid_twice_share": claims.shown(max(each.paid_twice for each in kills)), "bar": MOST_TWICE}
    return said | ({"note": "the engine is in the process of the actor"} if kind == "engine" else {})


def two(scoring: Scoring, made: Any, timeout_s: float = 3600) -> Line:
    """The same job twice at the same time. What both were asked for may be paid for by both: that has no bar."""
    folder = runs.labels(scoring.recipe)
    shutil.rmtree(folder, ignore_errors=True)
    with runs.Written(folder) as written:
        both = [runs.job(scoring.recipe, scoring.log, made.address) for _ in range(2)]
        try:
            ended = [job.wait(timeout_s) for job in both]
        finally:
            for job in both:
                runs.end(job)
    if any(ended):
        raise runs.Broken(f"of two jobs at once, one ended with {max(ended, key=abs)}: see {scoring.log}")
    pairs = len(scoring.undisturbed)
    said = {"claim": "exactly once: two jobs at once", "pairs": pairs, "pairs_per_batch": scoring.batch}
    said |= runs.worst([runs.compare(runs.rows(folder), scoring.undisturbed)])
    return said | {"most_paid_twice_share": claims.shown((written.pairs - pairs) / pairs), "bar": None}


def holds(said: Line) -> bool:
    exact = not (said["keys_wrong"] or said["doubled"] or said["missing"])
    cheap = said["bar"] is None or said["most_paid_twice_share"] < said["bar"]
    return exact and said["most_difference"] <= MOST_DIFFERENCE and cheap


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exactly_once", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny teacher, one kill of each kind")
    parser.add_argument("--times", type=int, help="kills of each kind; default 5, or 1")
    parser.add_argument("--only", default=",".join(ALL), help=f"of {','.join(ALL)}; default all")
    parser.add_argument("--pairs", type=int, help="default 4,000, or 1,600")
    parser.add_argument("--pairs-per-batch", type=int, help="what a kill can cost; default 128, or 32")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--out", type=Path, help="a file to add the lines to")
    given = parser.parse_args(argv)
    if unknown := set(given.only.split(",")) - set(ALL):
        parser.error(f"nothing to do by the name {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    runs.end_on_sigterm()
    small = {"size": made_up.TINY, "pairs": 1_600, "pairs_per_batch": 32, "times": 1}
    plan = small if given.small else {"size": made_up.FULL, "pairs": 4_000, "pairs_per_batch": 128, "times": 5}
    plan |= {name: value for name in plan if (value := getattr(given, name, None))}
    queries, held = range(plan["pairs"] // made_up.PLAIN.documents), True
    with tempfile.TemporaryDirectory(prefix="bench-once-") as folder, cluster() as made:
        settings = {"pairs_per_batch": plan["pairs_per_batch"]}
        scoring = undisturbed(made_up.make(Path(folder), queries, plan["size"], score=settings), made.address)
        for kind in given.only.split(","):
            if kind == TWO:
                said = two(scoring, made)
            else:
                moments = [random.Random(f"{given.seed} {kind} {n}") for n in range(plan["times"])]
                said = line(kind, [disturb(kind, scoring, made, rng) for rng in moments], scoring)
            claims.emit(said, given.out)
            held = held and holds(said)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
