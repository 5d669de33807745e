"""The endpoint on Ray Serve: how it is deployed."""

import os
import socket
from typing import Any

import ray.serve

from disranker import bundle
from serve.access import Keys, check_host
from serve.replica import Reranker
from serve.settings import Served, Settings


def build(args: dict[str, Any]) -> ray.serve.Application:
    """What `serve run serve.app:build bundle=...` and config.yaml run. Raises `Refused` for wrong settings.

    A bundle, and an experiment, may stand among the settings, for the command line; a file has them under
    `user_config`, where a change restarts nothing.
    """
    served = {name: args[name] for name in Served.model_fields if name in args}
    settings = Settings.checked({name: given for name, given in args.items() if name not in served})
    user_config = Served.checked(served).model_dump() if served else None
    # The replica itself decides how much may wait, by what it would take; Ray's numbers must not come first.
    deploy = ray.serve.deployment(max_ongoing_requests=1000, max_queued_requests=1000, user_config=user_config)
    return deploy(ray.serve.ingress()(Reranker)).bind(settings)


def serve_here(served: Served, settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> str:
    """The URL of the endpoint, started on the Ray this process is connected to; `ray.serve.shutdown()` ends it.

    Port 0 takes a free one. Raises `Refused` for a broken bundle or an open door, `RuntimeError` if Serve already
    listens elsewhere.
    """
    bundle.verify(served.bundle)
    check_host(host, Keys.load(settings.keys, os.environ))
    port = port or _free_port(host)
    ray.serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        # A Serve that runs keeps its address, and `start` only warns.
        raise RuntimeError(f"Serve was already up on this Ray and does not listen on {host}:{port}") from error
    ray.serve.run(build(served.model_dump() | settings.model_dump()), name="disranker", route_prefix="/")
    return f"http://{host}:{port}"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
