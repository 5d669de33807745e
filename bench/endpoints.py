"""Servers for the measurements: our endpoint as `serve deploy` starts it, and others with the same weights."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from bench import runs
from serve import front

START_S = 300.0  # until a server answers
CORES = os.cpu_count() or 1
SCRIPTS = Path(sys.executable).parent

Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    process: subprocess.Popen[bytes] | None = None  # None: it does not stand still while others have their turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is done with it while it runs."""
        _each(self.process, psutil.Process.resume)
        yield
        _each(self.process, psutil.Process.suspend)


def _each(process: subprocess.Popen[bytes] | None, does: Callable[[psutil.Process], None]) -> None:
    if process:
        whole = psutil.Process(process.pid)
        for each in [whole, *whole.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                does(each)


@contextmanager
def running(command: Sequence[str], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with all that stands below it."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=runs.ROOT, env=environment() | more, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        runs.end(process)


def environment() -> dict[str, str]:
    """Of a process that imports the project as it lies here, and reports its use to nobody."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    return os.environ | quiet | {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'platform'}", "HF_HUB_OFFLINE": "1"}


@contextmanager
def peers(folder: Path, bundle: Path, infinity: str | None) -> Iterator[list[Server]]:
    """vLLM at its best setting on CPUs, and infinity where it is; they stand still."""
    # Its command line asks for a package of the name vllm, which the one for CPUs has not.
    api_server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    commands: dict[str, tuple[list[str], str, dict[str, str]]] = {
        "vllm": (
            [*api_server, str(bundle), "--dtype", "bfloat16", "--served-model-name", "disranker"],
            "/v1/rerank",
            {"VLLM_CPU_OMP_THREADS_BIND": f"0-{CORES - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    }
    if infinity:
        options = ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--served-model-name", "disranker"]
        commands["infinity"] = [infinity, "v2", "--model-id", str(bundle), *options], "/rerank", {}
    with ExitStack() as stack:
        found = []
        for name, (command, path, more) in commands.items():
            log, address = folder / f"{name}.log", f"http://127.0.0.1:{(port := runs.free_port())}"
            command += ["--host", "127.0.0.1", "--port", str(port)]
            process = stack.enter_context(running(command, log, **more))
            try:
                runs.until(partial(_answers, f"{address}/health"), process, START_S, 0.5)
            except runs.Broken as error:
                raise runs.Broken(f"{name}: {error}: {log.read_text()[-2000:]}") from error
            found.append(Server(name, address + path, process))
            with found[-1].turn():
                pass  # stands still from here on
        yield found


def _answers(url: str, **headers: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, headers=headers).status_code == 200
    return False


def configured(bundle: Path, port: int, replicas: tuple[int, int], cpus: int, of_a_node: int, **more: Any) -> str:
    """serve/config.yaml with a bundle, from so many replicas to so many with `cpus` each; `more` are settings."""
    config = yaml.safe_load((runs.ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"cache_mib": 1} | more
    (deployment,) = application["deployments"]
    deployment["user_config"]["bundle"] = str(bundle)
    deployment["ray_actor_options"]["num_cpus"] = cpus
    deployment["max_replicas_per_node"] = of_a_node
    least, most = replicas
    scaling = {"min_replicas": least, "max_replicas": most, "downscale_delay_s": 5, "upscale_delay_s": 2}
    deployment["autoscaling_config"] |= scaling
    return yaml.safe_dump(config)


def serves(port: int, bundle: Path) -> bool:
    """Whether the endpoint on this port has this bundle."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        found = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).json()
        return bool(found["bundle"] == json.loads((bundle / "bundle.json").read_text())["digest"])
    return False


@dataclass
class Endpoint:
    """Ours, on a Ray of its own of so many nodes, each with all cores and a proxy."""

    folder: Path
    nodes: int = 1
    port: int = field(default_factory=runs.free_port)
    dashboard: str = field(default_factory=lambda: f"http://127.0.0.1:{runs.free_port()}")
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def server(self) -> Server:
        return Server("disranker", f"http://127.0.0.1:{self.port}/v1/rerank")

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment of each node, and of who speaks to them."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_ADDRESS": ""} | front.VARIABLES

    @contextmanager
    def up(self) -> Iterator["Endpoint"]:
        """Ray, without anything on it."""
        ray, log, gcs = str(SCRIPTS / "ray"), self.folder / "ray.log", runs.free_port()
        with ExitStack() as stack:
            for number in range(self.nodes):
                command = [ray, "start", "--block", f"--num-cpus={CORES}", "--object-store-memory=200000000"]
                command += [f"--dashboard-agent-listen-port={runs.free_port()}"]
                head = ["--head", f"--port={gcs}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
                head += [f"--ray-client-server-port={runs.free_port()}"]
                command += [f"--address=127.0.0.1:{gcs}"] if number else head
                self.processes.append(stack.enter_context(running(command, log, **self.variables)))
                runs.until(self._dashboard_answers, self.processes[-1], START_S, 0.5)
            yield self

    def deploy(self, bundle: Path, replicas: tuple[int, int] = (1, 1), cpus: int = CORES, **more: Any) -> None:
        """`configured`, and waits until that bundle serves."""
        path = self.folder / "config.yaml"
        path.write_text(configured(bundle, self.port, replicas, cpus, replicas[1] // self.nodes or 1, **more))
        command = [str(SCRIPTS / "serve"), "deploy", "--address", self.dashboard, str(path)]
        done = subprocess.run(
            command, cwd=runs.ROOT, env=environment() | self.variables, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise runs.Broken(f"serve deploy ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}")
        runs.until(partial(serves, self.port, bundle), self.processes[0], START_S, 0.2)

    def _dashboard_answers(self) -> bool:
        return _answers(f"{self.dashboard}/api/serve/applications/", Authorization=f"Bearer {self.token}")

    def workers(self, word: str) -> list[psutil.Process]:
        """Of Ray Serve: "Reranker" for replicas, "ProxyActor" for proxies."""
        return runs.workers([process.pid for process in self.processes], word)
