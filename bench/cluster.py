"""`ray up cluster.yaml` on one host: all stages by `ray job submit` while nodes die, and growth while there is work.

    python -m bench.cluster --only submitted     from log to served student on a head without work and nodes that die
    python -m bench.cluster --only growth        scoring alone: from one node to the most, and back
    python -m bench.cluster --only serving       an endpoint of two replicas, of whose nodes one dies under load

The nodes are those of `bench.one_host`; schema, commands, token and autoscaler are as on a cloud.
"""

import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench import claims, made_up, runs, serve
from bench.claims import Line
from bench.endpoints import SCRIPTS, START_S, Server, configured, serves
from bench.machines import apart, end, processes, said
from disranker.store import Store

EXACT = ("documents", "judgments", "searches", "rejects", "evidence", "queries", "clicked", "groups")
ALL = (*EXACT, "scores")  # as keys and scores of the teacher, of the student and of BM25
DIGITS = 1e-3  # of scores and metrics
KILLED = ("ingest", "finetune", "score", "distill")  # stages in which a node dies
DIE_AFTER_S = 2.0  # of the stage's start
Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    folder: Path
    recipe: str = "recipes/small.yaml"
    most: int = 3  # nodes that work
    cpus: int = 1  # of a node
    idle_seconds: int = 20
    lists: int = 400  # that are scored, of 20 documents
    serving_seconds: int = 60


@dataclass
class Cluster:
    """What `ray up` makes of cluster.yaml on this host, and the commands of docs/cluster.md."""

    folder: Path
    least: int = 1  # nodes of the group that has drivers
    most: int = 0  # more, of the other group
    cpus: int = 2  # of a node
    idle_s: float = 20.0
    gcs: int = field(default_factory=runs.free_port)
    dashboard: int = field(default_factory=runs.free_port)

    @property
    def nodes(self) -> Path:
        return self.folder / "nodes"

    @property
    def file(self) -> Path:
        return self.folder / "cluster.yaml"

    @property
    def served(self) -> Path:
        return self.folder / "serve.yaml"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever operates it, with the token in their home."""
        return apart(self.folder / "operator") | {"RAY_AUTH_MODE": "token"}

    def config(self) -> Json:
        """cluster.yaml with another provider, without the container, and with nodes of this size."""
        found: Json = yaml.safe_load((runs.ROOT / "cluster.yaml").read_text())
        ports = {"port": self.gcs, "dashboard": self.dashboard, "first": self.gcs % 200 + 10}
        found["provider"] = {"type": "external", "module": "bench.one_host.OneHost", "folder": str(self.nodes)} | ports
        del found["docker"], found["available_node_types"]["gpu"]["docker"]
        sizes = {"head": {}, "cpu": {"min_workers": self.least, "max_workers": self.least}, "gpu": {}}
        sizes["gpu"] |= {"max_workers": self.most, "idle_timeout_s": self.idle_s}
        for name, size in sizes.items():
            kind = found["available_node_types"][name]
            kind |= size | {"node_config": {}}
            kind["resources"] = {"CPU": self.cpus} | kind["resources"]
        found["initialization_commands"] = []  # of instances: their disks and mounts
        # What a cloud's provider brings along.
        found |= {"head_setup_commands": [], "worker_setup_commands": [], "cluster_synced_files": []}
        spill = self.folder / "spill"
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            found[commands] = [line.replace("/mnt/spill", str(spill)) for line in found[commands]]
        return found

    @contextmanager
    def up(self) -> Iterator["Cluster"]:
        for folder in ("operator", "spill"):
            (self.folder / folder).mkdir(parents=True)
        self.file.write_text(yaml.safe_dump(self.config(), sort_keys=False))
        self.run(self.command("ray get-auth-token"))
        try:
            self.run(self.command("ray up"))
            self.until(lambda: len(self.alive()) == 1 + self.least)
            self.until(lambda: self.asked("/api/jobs/") is not None)
            yield self
            self.run(self.command("ray down"))
            if left := self.alive():
                raise runs.Broken(f"ray down left {', '.join(home.name for home in left)}")
        finally:
            for home in self.homes():  # the head first, or its autoscaler starts others
                end(home)

    def command(self, start: str) -> list[str]:
        """The command of docs/cluster.md that begins so, with this cluster's files and address."""
        (found,) = [line for line in documented() if line.startswith(start)]
        here = {"cluster.yaml": self.file, "serve/config.yaml": self.served, "http://127.0.0.1:8265": self.address}
        program, *rest = shlex.split(found)
        return [str(SCRIPTS / program), *(str(here.get(word, word)) for word in rest)]

    def run(self, command: Sequence[str]) -> None:
        """Raises `Broken` with what it said."""
        done = subprocess.run(command, cwd=runs.ROOT, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            told = f"{done.stdout}{done.stderr}{self.logs()}"
            raise runs.Broken(f"{' '.join(command)} ended with {done.returncode}: {told}")

    def submit(self, stage: str, recipe: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
        """`ray job submit`, which follows the job."""
        documented = self.command("ray job submit")
        command = documented[: documented.index("--") + 1]
        command += ["python", "-m", f"jobs.{stage}", "--recipe", str(recipe), *options]
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=runs.ROOT,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def deploy(self, bundle: Path, port: int) -> None:
        """`serve deploy` with a replica on each of two nodes, and waits until they serve."""
        self.served.write_text(configured(bundle, port, (2, 2), 1, 1))
        self.run(self.command("serve deploy"))
        self.until(lambda: serves(port, bundle) and len(self.replicas()) == 2)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def asked(self, path: str) -> Any:
        """What the dashboard says; None where it does not answer."""
        token = (self.folder / "operator" / ".ray" / "auth_token").read_text().strip()
        with suppress(httpx.HTTPError, ValueError):
            reply = httpx.get(self.address + path, headers={"Authorization": f"Bearer {token}"}, timeout=5)
            return reply.json() if reply.status_code == 200 else None
        return None

    def alive(self) -> list[Path]:
        """Homes of the nodes that Ray runs on, the head first."""
        return [home for home in self.homes() if any("raylet" in each.info["name"] for each in processes(home))]

    def homes(self) -> list[Path]:
        """Of all nodes that there ever were, in order."""
        homes = [home for home in self.nodes.glob("*") if home.is_dir()]
        return sorted(homes, key=lambda home: int(home.name.rpartition(".")[2]))

    def driver(self) -> Path | None:
        """The node on which the job's own process runs."""
        return next(iter(self.running("-m jobs.")), None)

    def replicas(self) -> list[Path]:
        """The nodes that have one of the endpoint."""
        return self.running("Reranker")

    def running(self, words: str) -> list[Path]:
        """Homes of the nodes that run a process of whose command line these words are."""
        return [home for home in self.alive() if any(words in said(each) for each in processes(home))]

    def logs(self) -> str:
        """The end of what the commands of each node said."""
        found = [home / "log" for home in self.homes() if (home / "log").exists()]
        return "".join(f"\n{log}: {log.read_text(errors='replace')[-1500:]}" for log in found)

    def until(self, what: Callable[[], Any]) -> None:
        try:
            runs.until(what, None, START_S, 0.5)
        except runs.Broken as error:
            raise runs.Broken(f"the cluster is not as it should be: {error}: {self.logs()}") from None


def documented() -> list[str]:
    """The commands of docs/cluster.md for a cluster that `ray up` starts."""
    text = (runs.ROOT / "docs" / "cluster.md").read_text().split("## One that `ray up` starts")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


# Claims


def submitted(plan: Plan) -> Iterator[Line]:
    """The tables of a run whose nodes die, against those of a run on this machine alone; then its student is served."""
    from jobs import publish

    alone, ours = (_recipe(plan, name) for name in ("alone", "cluster"))
    runs.done(alone, plan.folder / "alone.log", stage="pipeline", artefact="bundle")
    with Cluster(plan.folder / "up", least=2).up() as cluster:
        died = killed(cluster, ours, plan.folder / "cluster.log")
        found = unlike(*(Store(str(runs.root(recipe))) for recipe in (alone, ours)))
        claim = "cluster: tables unlike those of one node"
        yield claims.within(claim, [len(found)], 0, "tables", unlike=found, died=died)
        asked = serve.Plan(plan.folder, store=str(runs.root(ours)), fault_seconds=plan.serving_seconds)
        yield outlived(cluster, asked, runs.root(ours) / publish.BUNDLE)


def _recipe(plan: Plan, name: str) -> Path:
    path = plan.folder / f"{name}.yaml"
    settings = yaml.safe_load((runs.ROOT / plan.recipe).read_text()) | {"root": str(plan.folder / name)}
    path.write_text(yaml.safe_dump(settings))
    return path


def growth(plan: Plan) -> Iterator[Line]:
    """Nodes over time while one stage scores: as few as there may be, as many as there may be, and few again."""
    pool = {"actors": 1, "max_actors": plan.most, "cpus_per_actor": 1, "pairs_per_batch": 64}
    recipe = made_up.make(plan.folder / "growth", range(plan.lists), score=pool)
    log, seen = plan.folder / "growth.log", []
    with Cluster(plan.folder / "grown", most=plan.most - 1, cpus=plan.cpus, idle_s=plan.idle_seconds).up() as cluster:
        seen.append(len(cluster.alive()) - 1)
        job = cluster.submit("score", recipe, log)
        try:
            while job.poll() is None:
                seen.append(len(cluster.alive()) - 1)
                time.sleep(1)
            if job.returncode:
                raise runs.Broken(f"the job ended with {job.returncode}: {log.read_text()[-3000:]}")
        finally:
            runs.end(job)
        ended = time.monotonic()
        cluster.until(lambda: len(cluster.alive()) == 2)
        shrunk_s = time.monotonic() - ended
    labels = runs.rows(runs.labels(recipe))
    counts = {"labels": len(labels), "keys": len(dict(labels)), "first": seen[0], "seconds": len(seen)}
    yield claims.against("cluster: nodes at most while it scores", [max(seen)], [plan.most], "nodes", 1.0, **counts)
    yield claims.within("cluster: one node again", [shrunk_s], 6 * plan.idle_seconds, "s")


def serving(plan: Plan) -> Iterator[Line]:
    """What clients lost that tried once more, while a node with a replica died and another came in its place."""
    (folder := plan.folder / "serving").mkdir()
    asked = serve.Plan(folder, tiny=True, engine="openvino", lists=40, fault_seconds=plan.serving_seconds)
    with Cluster(folder / "up", least=2).up() as cluster:
        yield outlived(cluster, asked, serve.made(asked).bundle)


def outlived(cluster: Cluster, asked: serve.Plan, bundle: Path) -> Line:
    """The same on a cluster that is up, with this bundle."""
    cluster.deploy(bundle, port := runs.free_port())
    server = Server("disranker", f"http://127.0.0.1:{port}/v1/rerank")
    stream = f"closed={serve.DOCUMENTS}x2"
    with serve.load_running(asked, server, stream, seconds=asked.fault_seconds, retry=True) as finished:
        time.sleep(asked.fault_seconds / 3)
        died = cluster.replicas()[-1]
        end(died)
        (told,) = finished()
    cluster.until(lambda: len(cluster.replicas()) == 2)
    return serve.lost("a node with a replica", told) | {"died": died.name}


def killed(cluster: Cluster, recipe: Path, log: Path, stages: Sequence[str] = KILLED, *options: str) -> list[str]:
    """Runs the pipeline, and ends a node that has no driver in each of the stages; the stages in which one died.

    Raises `Broken` if the job fails.
    """
    done, job = [], cluster.submit("pipeline", recipe, log, *options)
    try:
        for stage in stages:
            runs.until(lambda stage=stage: f"  {stage}: " in log.read_text(), job, 1800, 0.2)
            time.sleep(DIE_AFTER_S)
            (*_, last) = (home for home in cluster.alive()[1:] if home != cluster.driver())
            end(last)
            done.append(stage)
        if status := job.wait(1800):
            raise runs.Broken(f"the job ended with {status}: {log.read_text()[-3000:]}")
    finally:
        runs.end(job)
    return done


def unlike(one: Store, other: Store, tables: Sequence[str] = ALL) -> list[str]:
    """What differs between two runs: anything but fractions, and of those more than three digits."""
    found = []
    for table in tables:
        rows = [sorted(map(parted, _rows(store, table)), key=repr) for store in (one, other)]
        if [exact for exact, _ in rows[0]] != [exact for exact, _ in rows[1]]:
            found.append(f"{table}: {len(rows[0])} and {len(rows[1])} rows")
        elif not close([each for _, each in rows[0]], [each for _, each in rows[1]]):
            found.append(f"{table}: numbers")
    return found


def _rows(store: Store, table: str) -> list[Json]:
    """Of a table; files within the store by their place in it."""
    return [
        {key: value.removeprefix(store.path) if isinstance(value, str) else value for key, value in row.items()}
        for row in store.read(table).to_pylist()
    ]


def parted(value: Any) -> tuple[Any, list[float]]:
    """A value without its fractions, and those, in the order in which they stand in it."""
    if isinstance(value, float):
        return None, [value]
    if isinstance(value, dict):
        parts = {key: parted(each) for key, each in value.items()}
        return {key: exact for key, (exact, _) in parts.items()}, [n for _, each in parts.values() for n in each]
    if isinstance(value, list):
        items = [parted(each) for each in value]
        return [exact for exact, _ in items], [n for _, each in items for n in each]
    return value, []


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    """Numbers of each row, to three digits; what is no number is like another such alone."""
    pairs = [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return all(math.isclose(*pair, rel_tol=DIGITS, abs_tol=DIGITS) or all(map(math.isnan, pair)) for pair in pairs)


MEASUREMENTS = {each.__name__: each for each in (submitted, growth, serving)}
SMALL_PLAN = {"lists": 100, "idle_seconds": 5, "serving_seconds": 15}


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.cluster", Plan, MEASUREMENTS, SMALL_PLAN, argv, __doc__ or "", ("submitted",))


if __name__ == "__main__":
    sys.exit(main())
