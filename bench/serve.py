"""How the endpoint does under load: against the bare engine and against peers, when too much comes, and when parts die.

    python -m bench.serve                                        random weights in the size of MiniLM-L6, made-up texts
    python -m bench.serve --store runs/esci --of teacher         a trained BERT, on the lists of its run
    python -m bench.serve --only speed --infinity /venvs/infinity/bin/infinity_emb
    python -m bench.serve --only faults

The endpoint is that of serve/config.yaml, deployed by `serve deploy` on a Ray that this module starts; requests come
from a process of their own (`bench.load`). vLLM serves from this environment; infinity needs one of its own, and is
named and not measured without. All have the same weights and the same texts, cut so that no server has to, and no text
comes twice before all have come, so that nothing is remembered. A peer stands still while another has its turn.
"""

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from bench import arms, claims, engine, runs
from bench.claims import Line
from bench.endpoints import CORES, START_S, Endpoint, Server, environment, peers
from disranker import metrics
from disranker.report import HEADLINE

DOCUMENTS = 20  # of a request
CLIENTS = (1, 4, 16)
PEAK = 16  # of these: as many as keep the endpoint busy
SMALL, LARGE = 5, 200  # documents of requests that are mixed
BUSY = 0.6  # of the peak
WARM = 3  # requests before the clock starts: graphs are planned for each length
DEADLINE_S = 10.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    folder: Path
    store: str | None = None  # root of a run; None: made up
    of: str = "student"
    engine: str = "openvino-bf16"
    infinity: str | None = None
    tiny: bool = False
    peers: bool = True
    lists: int = 400  # whose documents are asked for
    seconds: int = 15  # of one turn
    rounds: int = 3
    overload_seconds: int = 600
    fault_seconds: int = 60


# What is served, and what is asked


@dataclass(frozen=True)
class Made:
    bundle: Path
    requests: Path
    judged: list[Json]  # lists of the test split: query, ids, texts, grades


@functools.cache
def made(plan: Plan) -> Made:
    """A bundle with the engine, and the texts of requests."""
    from disranker.store import Store

    root = plan.store or engine.made_up(plan.folder, plan.tiny)
    bundle = released(plan, Store(root).folder(plan.of), plan.folder / "bundle")
    tested, others = (
        [cut(row, bundle) for row in arms.listed(root, split)[: plan.lists]] for split in ("test", "train")
    )
    requests = plan.folder / "requests.jsonl"
    requests.write_text(
        "".join(json.dumps({"query": row["query"], "documents": row["texts"]}) + "\n" for row in [*tested, *others])
    )
    return Made(bundle, requests, tested)


def released(plan: Plan, model: str, target: Path) -> Path:
    """A bundle that serves with the engine of the plan."""
    from disranker import bundle, conversion
    from disranker.contract import Tokens

    assembled = plan.folder / "model"
    shutil.copytree(model, assembled)
    words = [" ".join(map(str, range(place, place + 20))) for place in range(200)]
    prompts = Tokens.load(assembled).prompts(words, words, words) if "int8" in plan.engine else None
    conversion.export(assembled, assembled, prompts)
    bundle.write(target, assembled, name="bench", report={}, engine=plan.engine)  # type: ignore[arg-type]
    return target


def cut(row: Mapping[str, Any], bundle: Path) -> Json:
    """A list as query, ids, texts and grades, each text as long as a pair with this query may be."""
    from tokenizers import Tokenizer

    from disranker.contract import Contract

    agreed = Contract.model_validate_json((bundle / "contract.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def first(text: str, most: int) -> str:
        ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        return text[: ends[most - 1]] if len(ends) > most else text

    query = first(row["query"], agreed.max_query_tokens)
    # One token less than there is room for: what is left of a word that is cut may be two.
    room = agreed.max_tokens - 4 - len(tokenizer.encode(query, add_special_tokens=False).ids)
    texts = [first(f"{doc['title']} {doc['summary']}", room) for doc in row["docs"]]
    ids, grades = ([doc[key] for doc in row["docs"]] for key in ("doc_id", "grade"))
    return {"query": query, "texts": texts, "ids": ids, "grades": grades}


# Load


def load(plan: Plan, server: Server, *streams: str, seconds: float | None = None, **more: Any) -> list[Json]:
    """What `bench.load` says of each stream ("closed=20x4")."""
    with load_running(plan, server, *streams, seconds=seconds, **more) as finished:
        return finished()


@contextmanager
def load_running(
    plan: Plan, server: Server, *streams: str, seconds: float | None = None, start: int = 0, retry: bool = False
) -> Iterator[Callable[[], list[Json]]]:
    """The same while something else is done; what is given waits for its end.

    With `retry` a client that was refused, or not answered, tries once more.
    """
    command = [sys.executable, "-m", "bench.load", server.url, str(made(plan).requests)]
    command += [f"--{stream}" for stream in streams]
    command += ["--seconds", str(seconds or plan.seconds), "--start", str(start), "--timeout", str(DEADLINE_S)]
    process = subprocess.Popen(
        command + ["--retry"] * retry,
        cwd=runs.ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )

    def finished() -> list[Json]:
        said, _ = process.communicate()
        if process.returncode:
            raise runs.Broken(f"bench.load ended with {process.returncode}")
        found: list[Json] = json.loads(said)["streams"]
        return found

    try:
        yield finished
    finally:
        runs.end(process)


def bare(plan: Plan) -> Json:
    """The engine in this process, on the same requests, one after the other."""
    from bench.load import bodies
    from disranker.engine import Engine

    mine = Engine.from_bundle(made(plan).bundle, CORES)
    lines = [json.loads(line) for line in made(plan).requests.read_text().splitlines()]
    asked = cycle([json.loads(body) for body in bodies(lines, DOCUMENTS, "jina", "")])
    took: list[float] = []
    while sum(took[WARM:]) < plan.seconds:
        body = next(asked)
        began = time.perf_counter()
        mine.scores([body["query"]] * DOCUMENTS, [""] * DOCUMENTS, body["documents"])
        took.append(time.perf_counter() - began)
    took = took[WARM:]
    return {"docs_per_s": DOCUMENTS * len(took) / sum(took), "p50_ms": 1e3 * statistics.median(took)}


# Claims


def speed(plan: Plan) -> Iterator[Line]:
    """Documents a second and latency of one, four and sixteen clients, by turns with the bare engine and with peers."""
    with ExitStack() as stack:
        ours = stack.enter_context(Endpoint(plan.folder).up())
        others = stack.enter_context(peers(plan.folder, made(plan).bundle, plan.infinity)) if plan.peers else []
        ours.deploy(made(plan).bundle)
        servers = [ours.server, *others]
        turns: dict[tuple[str, int], list[Json]] = {
            (server.name, clients): [] for server in servers for clients in CLIENTS
        }
        engines = []
        for number in range(plan.rounds):
            engines.append(bare(plan))
            for server in servers:
                with server.turn():
                    for clients in CLIENTS:
                        said = load(plan, server, f"closed={DOCUMENTS}x{clients}", start=number * plan.lists // 2)
                        turns[server.name, clients] += said
        found = {}
        for server in servers:
            with server.turn():
                found[server.name] = ndcg(plan, server)
    yield from _compared(plan, turns, engines, found)


def _compared(
    plan: Plan, turns: Mapping[tuple[str, int], list[Json]], engines: list[Json], found: Mapping[str, float]
) -> Iterator[Line]:
    shared = {"engine": plan.engine, "documents": DOCUMENTS}
    rate = {key: [said["docs_per_s"] for said in each] for key, each in turns.items()}
    middle = {key: [said["p50_ms"] for said in each] for key, each in turns.items()}
    for (name, clients), each in turns.items():
        more = {
            "p99_ms": statistics.median(said["p99_ms"] for said in each),
            "lost": sum(said["lost"] for said in each),
            "faults": [fault for said in each for fault in said["faults"]][:1],
        }
        more |= {"p50_ms": statistics.median(middle[name, clients])}
        yield claims.against(
            f"serve: {name}, {clients} clients",
            rate[name, clients],
            [e["docs_per_s"] for e in engines],
            "docs/s",
            None,
            **more,
            **shared,
        )
    most = {name: max((rate[name, clients] for clients in CLIENTS), key=statistics.median) for name in found}
    bare_rate, bare_ms = ([said[key] for said in engines] for key in ("docs_per_s", "p50_ms"))
    yield claims.against(
        "serve: throughput of the bare engine's", most["disranker"], bare_rate, "docs/s", 0.88, **shared
    )
    first = middle["disranker", 1]
    yield claims.against("serve: p50 of one client", first, bare_ms, "ms", 1 / 1.25, **shared)
    for name, bar in (("infinity", 4.5), ("vllm", 1.25)):
        if name not in found:
            yield {"claim": f"serve: against {name}", "ours": None, "bar": bar, "refused": "it was not started"}
            continue
        more = {HEADLINE: claims.shown(found["disranker"]), f"{HEADLINE} of peer": claims.shown(found[name])}
        yield claims.against(f"serve: against {name}", most["disranker"], most[name], "docs/s", bar, **more, **shared)


def ndcg(plan: Plan, server: Server) -> float:
    """NDCG@10 of the answers to whole lists of the test split."""
    qrels, run = {}, {}
    for row in made(plan).judged:
        body = {"query": row["query"], "documents": row["texts"], "model": "disranker", "return_documents": False}
        reply = httpx.post(server.url, json=body, timeout=60).raise_for_status().json()
        run[row["query"]] = {row["ids"][each["index"]]: each["relevance_score"] for each in reply["results"]}
        qrels[row["query"]] = dict(zip(row["ids"], row["grades"], strict=True))
    return float(np.mean(metrics.per_query(qrels, run)[HEADLINE]))


def latency(plan: Plan) -> Iterator[Line]:
    """At a part of the peak, and of small requests among large ones."""
    with Endpoint(plan.folder).up() as ours:
        ours.deploy(made(plan).bundle)
        rate = peak(plan, ours.server)
        calm, alone, beside, mixed = [], [], [], []
        for number in range(plan.rounds):
            more = {"start": number * plan.lists // 3, "seconds": 2 * plan.seconds}
            calm += load(plan, ours.server, f"open={DOCUMENTS}x{BUSY * rate / DOCUMENTS:.3f}", **more)
            alone += load(plan, ours.server, f"closed={SMALL}x1", **more)
            beside += load(plan, ours.server, f"closed={SMALL}x1", f"closed={LARGE}x1", **more)[:1]
            # Half of the documents in small requests, half in large ones.
            small, large = (f"open={size}x{BUSY * rate / 2 / size:.3f}" for size in (SMALL, LARGE))
            mixed.append(load(plan, ours.server, small, large, **more))
    shared = {"engine": plan.engine, "peak_docs_per_s": claims.shown(rate)}
    yield claims.against(
        f"serve: p99 at {BUSY:.0%} of the peak, of p50",
        [each["p99_ms"] for each in calm],
        [each["p50_ms"] for each in calm],
        "ms",
        1 / 4,
        **shared,
    )
    alone_ms = [each["p50_ms"] for each in alone]
    yield claims.against(
        f"serve: p99 of {SMALL} documents beside a client of {LARGE}, of their p50 alone",
        [each["p99_ms"] for each in beside],
        alone_ms,
        "ms",
        1 / 3,
        p50_ms=statistics.median(each["p50_ms"] for each in beside),
        **shared,
    )
    yield claims.against(
        f"serve: p99 of {SMALL} documents among {LARGE} at {BUSY:.0%} of the peak, of their p50 alone",
        [small["p99_ms"] for small, _ in mixed],
        alone_ms,
        "ms",
        1 / 3,
        large_p50_ms=statistics.median(large["p50_ms"] for _, large in mixed),
        small_p50_ms=statistics.median(small["p50_ms"] for small, _ in mixed),
        requests=sum(small["requests"] for small, _ in mixed),
        **shared,
    )


def peak(plan: Plan, server: Server) -> float:
    """Documents a second."""
    (found,) = load(plan, server, f"closed={DOCUMENTS}x{PEAK}")
    return float(found["docs_per_s"])


def overload(plan: Plan) -> Iterator[Line]:
    """Twice as much as can be done: what is answered, what is refused, and what it costs."""
    with Endpoint(plan.folder).up() as ours:
        ours.deploy(made(plan).bundle)
        most = peak(plan, ours.server)
        watched = [*ours.workers("Reranker"), *ours.workers("ProxyActor")]
        with load_running(
            plan, ours.server, f"open={DOCUMENTS}x{2 * most / DOCUMENTS:.3f}", seconds=plan.overload_seconds
        ) as finished:
            memory = np.array(sampled(watched, plan.overload_seconds))
            (said,) = finished()
    counts = {key: said[key] for key in ("requests", "statuses", "lost", "late", "p50_ms", "p99_ms", "faults")}
    shared = {"engine": plan.engine, "seconds": plan.overload_seconds}
    yield claims.against(
        "serve: throughput at twice the peak", [said["docs_per_s"]], [most], "docs/s", 0.9, **counts, **shared
    )
    yield claims.within("serve: lost or late at twice the peak", [said["lost"] + said["late"]], 0, "requests", **shared)
    tenths = [np.median(part, axis=0).round().tolist() for part in np.array_split(memory, 10)]  # replica and proxy
    early, last = (statistics.median(part.sum(axis=1)) for part in (memory[20:33], memory[-10:]))
    yield claims.against("serve: memory after, of that at first", [last], [early], "MiB", 0.95, tenths=tenths, **shared)


def sampled(processes: Sequence[psutil.Process], seconds: float) -> list[list[float]]:
    """MiB of each, a hundred times."""
    found = []
    for _ in range(100):
        time.sleep(seconds / 100)
        found.append([each.memory_info().rss / 2**20 for each in processes])
    return found


def faults(plan: Plan) -> Iterator[Line]:
    """Parts that die, and bundles that change, under load: what a client lost that tried once more."""
    with Endpoint(plan.folder, nodes=2).up() as ours:
        other = sibling(made(plan).bundle, plan.folder / "sibling")
        ours.deploy(made(plan).bundle, (2, 2), cpus=1)
        rate = BUSY * peak(plan, ours.server) / DOCUMENTS

        def kill(word: str) -> None:
            ours.workers(word)[-1].kill()

        events: dict[str, Callable[[], Any]] = {
            "SIGKILL of a replica": lambda: kill("Reranker"),
            "SIGKILL of a proxy": lambda: kill("ProxyActor"),
            "a roll to another bundle": lambda: ours.deploy(other, (2, 2), cpus=1),
            "a return": lambda: ours.deploy(made(plan).bundle, (2, 2), cpus=1),
        }
        for name, event in events.items():
            yield disturbed(plan, ours, name, event, f"open={DOCUMENTS}x{rate:.3f}")
        ours.deploy(made(plan).bundle, (1, 2), cpus=1)
        runs.until(lambda: len(ours.workers("Reranker")) == 1, ours.processes[0], START_S, 0.5)
        yield grown(plan, ours)


def disturbed(plan: Plan, ours: Endpoint, name: str, event: Callable[[], Any], stream: str) -> Line:
    with load_running(plan, ours.server, stream, seconds=plan.fault_seconds, retry=True) as finished:
        time.sleep(plan.fault_seconds / 3)
        event()
        (said,) = finished()
    for word in ("Reranker", "ProxyActor"):
        runs.until(lambda word=word: len(ours.workers(word)) == ours.nodes, ours.processes[0], START_S, 0.5)
    return lost(name, said)


def grown(plan: Plan, ours: Endpoint) -> Line:
    """From one replica to two under more clients than one is meant for, and back when they are gone."""
    said: list[Json] = []
    for clients, replicas in ((PEAK, 2), (1, 1)):
        began = time.monotonic()
        while len(ours.workers("Reranker")) != replicas:
            if time.monotonic() > began + START_S:
                raise runs.Broken(f"not {replicas} replicas within {START_S:g} s of {clients} clients")
            said += load(plan, ours.server, f"closed={DOCUMENTS}x{clients}", seconds=plan.fault_seconds, retry=True)
    return lost("growth from 1 replica to 2 and back", *said)


def lost(name: str, *said: Json) -> Line:
    """How many requests had no 200 in the end, of all that `load` says."""
    statuses: dict[str, int] = {}
    for each in said:
        for status, count in each["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    failed = sum(count for status, count in statuses.items() if status != "200")
    more = {key: sum(each[key] for each in said) for key in ("requests", "retried", "late")}
    faults = [fault for each in said for fault in each["faults"]]
    return claims.within(f"serve: lost by {name}", [failed], 0, "requests", statuses=statuses, **more, faults=faults)


def sibling(bundle: Path, target: Path) -> Path:
    """The same student under another name, so with another digest."""
    from disranker import bundle as bundles

    content = json.loads((bundle / "bundle.json").read_text())
    bundles.write(target, bundle, name="sibling", report={}, engine=content["engine"])
    return target


MEASUREMENTS = {each.__name__: each for each in (speed, latency, overload, faults)}
SMALL_PLAN = {
    "tiny": True,
    "peers": False,
    "engine": "openvino",
    "lists": 40,
    "seconds": 2,
    "rounds": 1,
    "overload_seconds": 10,
    "fault_seconds": 8,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--store", help="root of a run with groups and the model; default: made up")
    parser.add_argument("--of", default="student", choices=("student", "teacher"), help="default student")
    parser.add_argument("--engine", help=f"default {Plan.engine}")
    parser.add_argument("--infinity", help="the command of an environment in which infinity is installed")
    given, _ = parser.parse_known_args(argv)
    chosen = {name: value for name, value in vars(given).items() if value}
    measurements = {name: lambda plan, each=each: each(replace(plan, **chosen)) for name, each in MEASUREMENTS.items()}
    return claims.command("bench.serve", Plan, measurements, SMALL_PLAN, argv, __doc__ or "", parents=[parser])


if __name__ == "__main__":
    sys.exit(main())
