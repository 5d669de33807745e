"""The nodes of the cluster: what a task sees on each, and how many there may be."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from disranker import capacity
from disranker.capacity import Cluster, Kind
from jobs import probe

ANSWER_S = 60.0  # until a task on a node gives one: a worker may have to start there first
UNBOUNDED = 1e6  # CPUs or GPUs, where nothing says how many nodes there may be

Node = Mapping[str, Any]  # as `ray.nodes` has it
Answer = tuple[Node, Any]  # what its task gave; or the error of a task that gave none


def ask(look: Callable[..., Any], given: Callable[[Node], Iterable[Any]]) -> list[Answer]:
    """What a function of `jobs.probe` gives on each node that is alive.

    Asks for no CPU, as a head may have none, and waits for no node longer than `ANSWER_S`.
    """
    pending: dict[Any, Node] = {}
    ray.cloudpickle.register_pickle_by_value(probe)  # a node need not have it
    try:
        for node in filter(lambda node: node["Alive"], ray.nodes()):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            pending[task.remote(*given(node))] = node
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=ANSWER_S)
    answers: list[Answer] = [(pending[one], TimeoutError(f"no answer within {ANSWER_S:g} s")) for one in late]
    return answers + [(pending[one], _got(one)) for one in ready]


def _got(task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return error


def most(files: Iterable[Mapping[str, Any] | None]) -> Cluster | None:
    """The largest that the cluster may become: as a platform told Ray, else by the file of the head; None: unknown."""
    told = ray._private.state.state.get_cluster_config()
    if told and told.node_group_configs:
        groups = [(dict(group.resources), group.max_count) for group in told.node_group_configs]
        kinds = tuple(Kind(resources, count if count >= 0 else math.inf) for resources, count in groups)
        return Cluster(kinds=kinds, limits=dict(told.max_resources))
    return next((capacity.autoscaled(file) for file in files if file), None)


def largest(resource: str) -> float:
    """How much of a resource there is, or may be once an autoscaler has started all it may."""
    here = float(ray.cluster_resources().get(resource, 0))
    head = ray.get_runtime_context().gcs_address
    answers = [answer for _, answer in ask(probe.autoscaling, lambda node: (head,))]
    cluster = most(answer for answer in answers if not isinstance(answer, Exception))
    return min(max(here, cluster.total(resource)), UNBOUNDED) if cluster else here
