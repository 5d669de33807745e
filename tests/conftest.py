import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RAY = str(Path(sys.executable).with_name("ray"))

# Ray reads these once, when it is imported.
for name in [name for name in os.environ if name.startswith("RAY_")]:
    del os.environ[name]
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}

TINY = {
    "seed": 3,
    "world": {"documents": 300, "queries": 120, "judged": 100, "searches": 2000, "shards": 2},
    "ingest": {"parts": 2},
    "aggregate": {"em_rounds": 5},
    "sample": {"judged": 6, "shown": 4, "bm25": 2, "random": 2},
    "teacher": {"vocabulary": 400, "width": 32, "layers": 1, "heads": 1},
    "student": {"vocabulary": 400, "width": 32, "layers": 1, "heads": 2},
    "pretrain": {"epochs": 1, "checkpoint_every_steps": 10},
    "finetune": {"epochs": 1, "checkpoint_every_steps": 10},
    "score": {"pairs_per_batch": 64},
    "distill": {"epochs": 1, "checkpoint_every_steps": 10},
    "evaluate": {"resamples": 200},
    # A student that hardly learned anything: 8 bits turn many of its near ties around.
    "publish": {
        "min_share_of_teacher": 0.0,
        "beat_bm25": False,
        "max_rounding_loss": 0.5,
        "min_rounding_tau": 0.0,
        "calibration_lists": 10,
        "timed_lists": 5,
        "timing_rounds": 2,
    },
}


class Cluster(NamedTuple):
    """A Ray of one node that asks for a token."""

    jobs: str  # address of the dashboard, which takes jobs
    address: str  # what a driver joins
    head: int  # its process


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The one Ray of all tests; this process and its children have the token. Only what it started is ended."""
    folder = tmp_path_factory.mktemp("head")
    port, dashboard, client, agent = (_free_port() for _ in range(4))
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=400000000"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}"]  # its default may belong to another Ray of this machine
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _ready(Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", head.pid), folder / "log")
    finally:
        _end(head)


@pytest.fixture(scope="session")
def submitted(cluster, tiny, tmp_path_factory):
    """What `ray job submit` of the whole pipeline said and left, with the commands of docs/cluster.md."""
    recipe = tmp_path_factory.mktemp("submit") / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny))
    command = [RAY, "job", "submit", "--address", cluster.jobs, "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps({"py_modules": ["platform/disranker"]})]
    command += ["--", sys.executable, "-m", "jobs.pipeline", "--recipe", str(recipe)]
    for _ in range(30):  # the dashboard answers before the node's agent is there
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        if "No available agent" not in done.stdout + done.stderr:
            return done
        time.sleep(2)
    raise AssertionError(f"the node has no agent: {done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def ray_here(cluster):
    """This process as a driver of the cluster."""
    import ray

    from serve import front

    ray.init(
        address=cluster.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", **front.VARIABLES}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A bundle of a student of random weights."""
    from test_engine import save_student

    from disranker import bundle

    folder = tmp_path_factory.mktemp("released")
    bundle.write(folder / "bundle", save_student(folder / "student"), name="shoes", report={})
    return folder / "bundle"


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A bundle of another student."""
    from test_engine import save_student

    from disranker import bundle

    folder = tmp_path_factory.mktemp("other")
    bundle.write(folder / "bundle", save_student(folder / "student", num_hidden_layers=1), name="other", report={})
    return str(folder / "bundle")


@pytest.fixture(scope="session")
def student(released):
    """The engine of that bundle."""
    from disranker.engine import Engine

    return Engine(released)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The recipe of a run that takes two minutes."""
    return TINY | {"root": str(tmp_path_factory.mktemp("tiny") / "run")}


@pytest.fixture(scope="session")
def tiny_run(submitted, ray_here, tiny):
    """The store of a finished, undisturbed run of all stages. Read only: a test that changes it works on a copy."""
    from disranker.store import Store

    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-1000:]
    return Store(tiny["root"])


@pytest.fixture(scope="session")
def qrels():
    """Made-up judgments."""
    import rankings

    return rankings.judgments()


@pytest.fixture(scope="session")
def runs(qrels):
    """Three rankings of what `qrels` judges."""
    import rankings

    return rankings.three(qrels)


@pytest.fixture(scope="session")
def found(qrels, runs):
    """What `report.evaluate` finds in `runs`."""
    import rankings

    from disranker import report

    return report.evaluate(qrels, runs, rankings.CFG, 1, rankings.cut(qrels))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ready(cluster: Cluster, log: Path) -> Cluster:
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    for _ in range(120):
        try:
            if httpx.get(f"{cluster.jobs}/api/jobs/", headers=token).status_code == 200:
                return cluster
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no cluster at {cluster.jobs}: {log.read_text()}")


def _end(head: subprocess.Popen) -> None:
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
