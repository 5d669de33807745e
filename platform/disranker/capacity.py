"""What the stages of a recipe ask of a cluster at once, and what a cluster has room for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from disranker import contract
from disranker.recipe import Recipe, Refused, Training

TRAININGS = ("pretrain", "finetune", "distill")
GIB = 2**30


Resources = Mapping[str, float]  # of one node, as Ray counts them: CPU, GPU, memory in bytes, object_store_memory


@dataclass(frozen=True)
class Kind:
    """Nodes of one size that an autoscaler may start."""

    resources: Resources
    most: float  # infinite where nothing says how many


@dataclass(frozen=True)
class Cluster:
    """As large as it is, or may become."""

    nodes: tuple[Resources, ...] = ()  # that are there in any case
    kinds: tuple[Kind, ...] = ()
    started: float = math.inf  # most nodes of all kinds together
    limits: Resources = field(default_factory=dict)  # on all nodes together

    def total(self, resource: str) -> float:
        """At most so much of a resource."""
        return min(self._most(lambda node: node.get(resource, 0)), self.limits.get(resource, math.inf))

    def has_room(self, ask: "Ask") -> bool:
        """Whether all of it runs at once."""
        wanted = {"CPU": ask.cpus, "GPU": ask.gpus, "memory": ask.memory}
        cpus, gpus = ask.count * ask.cpus + ask.beside, ask.count * ask.gpus
        rounding = 1e-6  # 3 * 0.1 > 0.3
        enough = self.total("CPU") + rounding >= cpus and self.total("GPU") + rounding >= gpus
        return enough and self._most(lambda node: _times(node, wanted)) >= ask.count

    def _most(self, value: Callable[[Resources], float]) -> float:
        """The largest sum of what each node is worth."""
        left, found = self.started, sum(map(value, self.nodes))
        for worth, most in sorted(((value(kind.resources), kind.most) for kind in self.kinds), reverse=True):
            taken = min(left, most)
            left -= taken
            found += worth * taken if worth and taken else 0.0  # infinite times nothing is no number
        return found


@dataclass(frozen=True)
class Ask:
    """So many processes, each whole on one node, and CPUs for tasks beside them."""

    stage: str
    what: str
    count: int
    cpus: float
    gpus: float = 0
    memory: float = 0
    beside: int = 0
    mend: str = ""


def asks(recipe: Recipe) -> list[Ask]:
    """What the stages ask for. Workers of Ray Train read from the storage: beside them no task needs a CPU."""
    pools = [
        # An actor of Ray Data, and the task that feeds it.
        Ask(name, "1 CPU for an actor and 1 for a task", 1, 1, beside=1, mend="give Ray 2 CPUs")
        for name in ("sample", "evaluate")
    ]
    trainings = [name for name in TRAININGS if name != "pretrain" or not _is_encoder(recipe.teacher.base)]
    return [*pools, *(_workers(name, getattr(recipe, name)) for name in trainings), _engines(recipe)]


def _workers(stage: str, cfg: Training) -> Ask:
    what = f"{cfg.workers} workers of {cfg.cpus_per_worker} CPUs and {cfg.gpus_per_worker} GPUs"
    mend = f"lower {stage}.workers, cpus_per_worker or gpus_per_worker"
    return Ask(stage, what, cfg.workers, cfg.cpus_per_worker, cfg.gpus_per_worker, mend=mend)


def _engines(recipe: Recipe) -> Ask:
    """The GPUs of one engine lie on one node, as its placement group asks."""
    cfg = recipe.score
    cpus, gpus = cfg.cpus_per_actor * cfg.tensor_parallel, cfg.gpus_per_actor * cfg.tensor_parallel
    memory = 0 if gpus else cfg.kv_cache_gib * GIB
    what = f"{cfg.actors} engines of {cpus:g} CPUs, {gpus} GPUs and {cfg.kv_cache_gib} GiB of cache, and 1 CPU to read"
    mend = "lower score.actors, cpus_per_actor, tensor_parallel or kv_cache_gib"
    return Ask("score", what, cfg.actors, cpus, gpus, memory, beside=1, mend=mend)


def _is_encoder(base: str) -> bool:
    try:
        return contract.form(base) == "encoder"
    except Refused:  # there is none: another check says so
        return False


def autoscaled(config: Mapping[str, Any]) -> Cluster | None:
    """What the file of `ray up`, or of `ray start --autoscaling-config`, allows; None where it does not say."""
    types, head = config.get("available_node_types") or {}, config.get("head_node_type")
    workers, kinds = config.get("max_workers", math.inf), []
    for name, about in types.items():
        if "resources" not in about or (not about["resources"] and name != head):
            return None  # left to the cloud to fill in
        kinds.append(Kind(about["resources"], about.get("max_workers", 0 if name == head else workers)))
    return Cluster((types[head]["resources"],), tuple(kinds), workers) if head in types else None


def _times(resources: Resources, wanted: Resources) -> float:
    """How often something fits into one node."""
    # A kind of an autoscaler need not say its memory; a node that is there does.
    asked = {name: amount for name, amount in wanted.items() if amount and (name != "memory" or name in resources)}
    each = [math.floor(resources.get(name, 0) / amount + 1e-6) for name, amount in asked.items()]
    return min(each, default=math.inf)
