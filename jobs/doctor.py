"""What would go wrong on this cluster with this recipe, and what to do about it, before anything is spent."""

import dataclasses
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from pyarrow import fs

from disranker import doctor
from disranker import recipe as recipes
from disranker.doctor import Deployment, Facts, Finding, Node
from disranker.recipe import Recipe, Refused, in_a_line
from disranker.store import Store
from jobs import launch, nodes, probe

CONNECT_S = 5.0  # until the head answers
STORAGE_S = 60.0  # until the storage does: clients of object stores try again by themselves
SERVE_CONFIG = "serve/config.yaml"
TOKEN = "put that of the cluster into ~/.ray/auth_token, or into RAY_AUTH_TOKEN"


def run(recipe: Recipe, serve_config: str) -> list[Finding]:
    """What the checks find. Raises `Refused` where the cluster cannot be joined."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local" and not ray.is_initialized()
    if not alone and not ray.is_initialized():
        reach(address)
    join(address)
    head = ray.get_runtime_context().gcs_address
    return doctor.examine(gather(recipe, serve_config, None if alone else head, asks_for_token(head)), recipe)


# The head


def reach(address: str) -> None:
    """Raises `Refused` in seconds where Ray would try for minutes: nobody there, no token, or a wrong one."""
    if "://" in address:
        raise Refused(
            f"RAY_ADDRESS {address}: a job takes the head as host:6379; to submit it to a dashboard, give the address "
            "to ray job submit --address"
        )
    address = _here() if address == "auto" else address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise Refused(
            f"no Ray at RAY_ADDRESS {address}: {error}; start the head (ray start --head), open its port, or correct "
            "the address"
        ) from error
    asks_for_token(address)


def asks_for_token(address: str) -> bool:
    """Whether the head asks for a token, and takes ours. Raises `Refused` where it does not, or this is no head."""
    from grpc import StatusCode
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    ours, tokens = get_authentication_mode() == AuthenticationMode.TOKEN, AuthenticationTokenLoader.instance()
    if ours and not tokens.has_token(ignore_auth_mode=True):
        raise Refused(f"RAY_AUTH_MODE is token, and there is no token; {TOKEN}")
    found = _answer(address, {})
    if found == StatusCode.OK:
        return False
    if found != StatusCode.UNAUTHENTICATED:
        raise Refused(
            f"what answers at {address} is no head of Ray ({found.name}); give the address of ray start --head"
        )
    if not ours:
        raise Refused(f"the cluster at {address} asks for a token; set RAY_AUTH_MODE=token, and {TOKEN}")
    if _answer(address, tokens.get_token_for_http_header()) != StatusCode.OK:
        raise Refused(f"the cluster at {address} does not take this token; {TOKEN}")
    return True


def _here() -> str:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError as error:
        raise Refused(
            "RAY_ADDRESS auto: not one Ray on this machine; start it, or give the head as host:6379"
        ) from error


def _answer(address: str, headers: Mapping[str, str]) -> Any:
    """The status of one small call to the head, as gRPC names it."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        chain, key, root = load_certs_from_env()
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain))
    else:
        channel = grpc.insecure_channel(address)
    call = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId
    try:
        call(gcs_service_pb2.GetClusterIdRequest(), timeout=CONNECT_S, metadata=tuple(headers.items()))
    except grpc.RpcError as error:
        return error.code()
    finally:
        channel.close()
    return grpc.StatusCode.OK


def join(address: str) -> None:
    """As every job does. Raises `Refused` with what Ray says."""
    try:
        launch.connect()
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Refused(
            f"Ray at {address} cannot be joined: {in_a_line(error)}; have one Ray and Python on all machines, and "
            "where this one is no node use ray job submit"
        ) from error


# Facts


def gather(recipe: Recipe, serve_config: str, address: str | None, asks_for_token: bool) -> Facts:
    """What is seen from here and, by a task on each, from all nodes. Leaves nothing in the storage."""
    endpoint = deployment(serve_config)  # before any node is asked
    try:
        store = Store(recipe.root)
    except (OSError, ValueError) as error:
        raise Refused(
            f"root {recipe.root}: {in_a_line(error)}; give a folder, or a URI such as s3://bucket/run"
        ) from error
    folder, content = f".doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    new, fault = within(STORAGE_S, lambda: _put(store, folder, content))
    try:
        found, silent = ask(store.uri, folder, content)
        seen, unlisted = within(STORAGE_S, lambda: {info.base_name for info in store.files(folder)})
    finally:
        within(STORAGE_S, lambda: _remove(store, folder, new))
    return Facts(
        root=store.uri,
        driver=probe.versions(),
        nodes=tuple(_node(name, said, seen or set()) for name, said in found.items()),
        address=address,
        asks_for_token=asks_for_token,
        silent=silent,
        storage=fault or unlisted,
        most=nodes.most(said["autoscaling"] for said in found.values()),
        serve=endpoint,
    )


def within(seconds: float, work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it gives and None; or None and why there is nothing in that time."""
    found: list[tuple[Any, str | None]] = [(None, f"no answer within {seconds:g} s")]

    def guarded() -> None:
        try:
            found[0] = work(), None
        except Exception as error:  # each file system has its own
            found[0] = None, f"{type(error).__name__}: {in_a_line(error)}"

    thread = threading.Thread(target=guarded, daemon=True)  # one that hangs must not keep this process
    thread.start()
    thread.join(seconds)
    return found[0]


def _put(store: Store, folder: str, content: bytes) -> bool:
    """Writes what the nodes are to find; whether the root itself is new."""
    new = store.fs.get_file_info(store.path).type == fs.FileType.NotFound
    store.put(lambda out: out.write(content), folder, "driver")
    return bool(new)


def _remove(store: Store, folder: str, new: bool | None) -> None:
    store.fs.delete_dir(store.at(folder))
    if new and store.local:
        with suppress(OSError):  # a job that began meanwhile wrote there
            Path(store.path).rmdir()


def ask(uri: str, folder: str, content: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each node says, and why others say nothing."""
    head = ray.get_runtime_context().gcs_address
    found, silent = {}, {}
    for node, said in nodes.ask(probe.look, lambda node: (uri, folder, node["NodeID"], content, head)):
        if isinstance(said, Exception):
            silent[_name(node)] = str(said).strip().splitlines()[-1]
        else:
            found[_name(node)] = {**said, "id": node["NodeID"], "resources": node["Resources"]}
    return found, silent


def _name(node: Mapping[str, Any]) -> str:
    """Several nodes of one machine share its address."""
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _node(name: str, said: Mapping[str, Any], seen: set[str]) -> Node:
    unseen = None if said["id"] in seen else "what it writes is not seen by the driver"
    fields = {field.name: said[field.name] for field in dataclasses.fields(Node) if field.name in said}
    return Node(**fields | {"name": name, "storage": said["storage"] or unseen})


def deployment(file: str) -> Deployment | None:
    """The endpoint in a config of Serve, with the defaults of `serve.app.build` and of Ray. Raises `Refused`."""
    from serve.settings import Settings

    if not Path(file).is_file():
        return None
    try:
        config = yaml.safe_load(Path(file).read_text())
        application = config["applications"][0]
        replica = next(one for one in application["deployments"] if one["name"] == "Reranker")
    except (OSError, yaml.YAMLError, LookupError, TypeError, StopIteration) as error:
        raise Refused(f"{file} is no config of Serve with a deployment Reranker: {error!r}") from error
    settings = Settings.checked(application.get("args") or {})
    scaling = replica.get("autoscaling_config")
    return Deployment(
        file=file,
        max_ongoing_requests=replica.get("max_ongoing_requests", 1000),
        max_queued_requests=replica.get("max_queued_requests", 1000),
        target_ongoing_requests=scaling.get("target_ongoing_requests", 2) if scaling else None,
        replicas=scaling.get("min_replicas", 1) if scaling else replica.get("num_replicas", 1),
        num_cpus=(replica.get("ray_actor_options") or {}).get("num_cpus", 1),
        threads=settings.threads,
        tokens_per_batch=settings.tokens_per_batch,
        timeout_s=settings.timeout_s,
        request_timeout_s=(config.get("http_options") or {}).get("request_timeout_s"),
        health_check_timeout_s=replica.get("health_check_timeout_s", 30),
    )


# Saying it


def line(one: Finding) -> str:
    return f"ok    {one.name}: {one.said}" if one.ok else f"FAIL  {one.name}: {one.said} -> {one.mend}"


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.doctor", __doc__)
    parser.add_argument("--serve-config", default=SERVE_CONFIG, metavar="FILE", help=f"of the endpoint: {SERVE_CONFIG}")
    # A file: Ray itself prints among the lines, of autoscalers for one.
    parser.add_argument("--json", metavar="FILE", help="write the findings there too, as a JSON list")
    arguments = parser.parse_args(argv)

    def work() -> None:
        findings = run(recipes.load(arguments.recipe, arguments.set), arguments.serve_config)
        print("\n".join(map(line, findings)), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps([dataclasses.asdict(one) for one in findings], indent=1))
        if failed := [one.name for one in findings if not one.ok]:
            raise Refused(f"{len(failed)} of {len(findings)} checks fail: {', '.join(failed)}")

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
