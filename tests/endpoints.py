"""The endpoint in this process, without Ray."""

import asyncio
import threading
import time
from contextlib import contextmanager

import uvicorn

from serve.api import api
from serve.replica import Reranker
from serve.settings import Settings


@contextmanager
def reranking(bundle, experiment=None, **settings):
    """A replica that serves a bundle."""
    made = Reranker(Settings(**settings))
    asyncio.run(made.reconfigure({"bundle": str(bundle), "experiment": experiment}))
    yield made
    made.close()


@contextmanager
def over_http(scorer):
    """Its routes on a port of this host; gives (host, port)."""
    server = uvicorn.Server(uvicorn.Config(api(scorer), port=0, log_level="error", timeout_keep_alive=60))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()
