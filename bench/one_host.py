"""Nodes of `ray up` on one host: each has a loopback address and a home folder, and its commands run in a shell.

What a cloud's provider does with instances and SSH is done here with files and processes; all else, from the schema to
the commands that start Ray, is as on a cloud. `provider` of the YAML:

    {type: external, module: bench.one_host.OneHost, folder: /tmp/nodes, port: 40123, dashboard: 40124, first: 1}

Each node has a /tmp/ray of its own, by a mount that it alone sees (`unshare`): Ray gives all nodes the head's folder,
and one that comes later would unpack what a job brings anew, so that others lose the folder they work in.

Addresses are 127.0.<first>.1 and so on. What runs on a node has its home in `MARK` of its environment, and ends by it.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray._common.utils import get_default_ray_temp_dir
from ray.autoscaler._private.command_runner import _with_environment_variables
from ray.autoscaler._private.subprocess_output_util import ProcessRunnerError
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider

from bench import runs
from bench.machines import MARK, apart, end

# With mounts of its own; who is not root becomes it there, and there alone.
APART = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
MEMORY = 200_000_000  # bytes of each node's object store

Json = dict[str, Any]


class OneHost(NodeProvider):
    """A file `<address>.json` with its tags is a node that runs. Several processes look at them."""

    def __init__(self, provider_config: Json, cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._folder.mkdir(parents=True, exist_ok=True)

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        found = {path.stem: self.node_tags(path.stem) for path in sorted(self._folder.glob("*.json"))}
        return [node for node, tags in found.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return self._file(node_id).exists()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with suppress(FileNotFoundError):
            found: dict[str, str] = json.loads(self._file(node_id).read_text())
            return found
        return {}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with alone(self._folder / "nodes"):
            if self.is_running(node_id):
                self._write(node_id, self.node_tags(node_id) | tags)

    def external_ip(self, node_id: str) -> str:
        return node_id

    internal_ip = external_ip

    def create_node(self, node_config: Json, tags: dict[str, str], count: int) -> Json:
        first = self.provider_config["first"]
        with alone(self._folder / "nodes"):
            # An address is not given twice: Ray remembers who had it.
            past = sum(1 for path in self._folder.iterdir() if path.is_dir())
            made = [f"127.0.{first}.{place + 1}" for place in range(past, past + count)]
            for node in made:
                (self._folder / node).mkdir()
                self._write(node, tags)
        return {node: {} for node in made}

    def terminate_node(self, node_id: str) -> None:
        self._file(node_id).unlink(missing_ok=True)
        end(self._folder / node_id)

    def get_command_runner(self, log_prefix: str, node_id: str, *_: Any, **__: Any) -> "Shell":
        return Shell(node_id, self._folder / node_id, self.provider_config)

    def _file(self, node: str) -> Path:
        return self._folder / f"{node}.json"

    def _write(self, node: str, tags: dict[str, str]) -> None:
        unfinished = self._folder / f".{node}.{os.getpid()}"
        unfinished.write_text(json.dumps(tags))
        unfinished.replace(self._file(node))


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """No other process is in here meanwhile."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Shell(CommandRunnerInterface):
    """Runs the commands of a node as SSH would on its machine."""

    def __init__(self, node: str, home: Path, config: Json):
        self._node, self._home, self._config = node, home, config

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,
        with_output: bool = False,
        environment_variables: Json | None = None,
        **_: Any,
    ) -> str:
        command = _with_environment_variables(cmd or "true", environment_variables or {})
        # One node after the other: two that start at once take the same name for a socket.
        with alone(self._home.parent / "commands"), (self._home / "log").open("ab") as log:
            log.write(f"$ {command}\n".encode())
            log.flush()
            done = subprocess.run(
                [*APART, "bash", "-c", f"{self.mounted()} && {self.here(command)}"],
                cwd=self._home,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if with_output else log,
                stderr=log,
                timeout=max(timeout, 120),
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            raise ProcessRunnerError("a command failed", "ssh_command_failed", code=done.returncode, command=command)
        return (done.stdout or b"").decode()

    def mounted(self) -> str:
        """The command that puts a folder of this node in the place of Ray's."""
        places = f"{self._home / 'ray'} {get_default_ray_temp_dir()}"
        return f"mkdir -p {places} && mount --bind {places}"

    def here(self, command: str) -> str:
        """The command where other nodes, and other Rays, are on the same host."""
        if "ray stop" in command:
            return "true"  # it ends every Ray of the host
        own = f"ray start --node-ip-address={self._node} --object-store-memory={MEMORY}"
        own += f" --dashboard-agent-listen-port={runs.free_port()}"
        if "--head" in command:
            own += f" --dashboard-port={self._config['dashboard']} --ray-client-server-port={runs.free_port()}"
        gcs = str(self._config["port"])
        return command.replace("ray start", own).replace("=6379", f"={gcs}").replace(":6379", f":{gcs}")

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return apart(self._home) | {"PATH": path, MARK: str(self._home), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

    def run_rsync_up(self, source: str, target: str, options: Json | None = None) -> None:
        place = Path(target.replace("~", str(self._home), 1))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place)

    def remote_shell_command_str(self) -> str:
        return f"HOME={self._home} bash"
