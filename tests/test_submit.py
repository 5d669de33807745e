"""`ray job submit` to a cluster that asks for a token, as docs/cluster.md says it, with a tiny recipe."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from conftest import ROOT, TINY

from disranker.store import Store

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def cluster(tmp_path):
    """(address, environment) of a head of its own, with a token; only what it started is ended."""
    free = [_free_port() for _ in range(4)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free[0]}", f"--dashboard-port={free[1]}"]
    command += ["--object-store-memory=200000000", f"--ray-client-server-port={free[2]}"]
    command += [f"--dashboard-agent-listen-port={free[3]}"]  # its default may belong to another Ray of this machine
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{free[1]}"
    try:
        _wait(address, environment["RAY_AUTH_TOKEN"], tmp_path / "head.log")
        yield address, environment
    finally:
        family = [head, *psutil.Process(head.pid).children(recursive=True)]
        head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(p.pid) for p in family if psutil.pid_exists(p.pid)], timeout=20)
        for process in alive:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(address: str, token: str, log: Path) -> None:
    for _ in range(120):
        try:
            reply = httpx.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            if reply.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no cluster at {address}: {log.read_text()}")


@pytest.mark.slow
def test_the_pipeline_submitted_to_a_cluster_with_a_token_runs_to_the_end(cluster, tmp_path):
    address, environment = cluster
    assert httpx.get(f"{address}/api/jobs/").status_code in (401, 403)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"root": str(tmp_path / "run")}))
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", "."]
    submit += ["--runtime-env-json", json.dumps({"py_modules": ["platform/disranker"]})]
    job = [sys.executable, "-m", "jobs.pipeline", "--recipe", str(path)]
    for _ in range(30):  # the dashboard answers before the node's agent is there
        command = [*submit, "--", *job]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        if "No available agent" not in run.stdout + run.stderr:
            break
        time.sleep(2)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert Store(str(tmp_path / "run")).finished("bundle")
