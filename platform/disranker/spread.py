"""A model over several workers: all of it on each (DDP), or a share of every weight (FSDP2); its weights in and out.

Only weights that are trained are saved and loaded: the rest is as it was in the folder that the run started from.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from disranker.recipe import Training

Weights = dict[str, Tensor]


def shard(model: nn.Module, cfg: Training, device: torch.device) -> nn.Module:
    """The model with every weight cut among all workers, layer by layer; a layer is whole only while it computes.

    In bfloat16 a layer computes on a copy; the weights themselves, and the sums of gradients, stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    narrow = torch.bfloat16 if cfg.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, output_dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, model):
        # Also the outermost module, which would stay whole after a validation: a share of it is what is saved.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def recompute(model: nn.Module) -> None:
    """Lets the backward pass compute activations again instead of keeping them."""
    inner: Any = next(module for module in model.modules() if hasattr(module, "gradient_checkpointing_enable"))
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def plain(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrapper that spreads it over ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def exchanging(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Under DDP, whether the gradients of a backward pass are summed over the workers at once, or wait for a later one.

    Under FSDP they always are: to wait, a worker would have to hold the gradients of all weights.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and not wanted:
        return model.no_sync()
    return nullcontext()


def mine(model: nn.Module) -> Weights:
    """What this worker holds of the trained weights: copies on the CPU."""
    return {name: _local(weight).detach().cpu().clone() for name, weight in _trained(model)}


def whole(model: nn.Module, wanted: bool = True) -> Weights:
    """The trained weights, on the CPU; nothing for a worker that does not want them.

    Under FSDP every worker has to ask at the same time, and each weight is whole on all of them for a moment.
    """
    gathered = ((name, _whole(weight.detach())) for name, weight in _trained(model))
    return {name: weight.cpu().clone() for name, weight in gathered if wanted}


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets the trained weights to those of `mine`, by name; of an unspread model also to those of `whole`."""
    for name, weight in _trained(model):
        _local(weight).copy_(weights[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of this worker's share, as plain tensors."""
    state = optimizer.state_dict()
    return state | {"state": {at: {k: _local(v) for k, v in one.items()} for at, one in state["state"].items()}}


def put_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Sets the state to that of `optimizer_state`; of a weight that is shared among workers it is shared too."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    found = {at: {k: _like(weights[at], value) for k, value in one.items()} for at, one in state["state"].items()}
    optimizer.load_state_dict({**state, "state": found})


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight) for name, weight in plain(model).named_parameters() if weight.requires_grad)


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A moment of the optimiser, shared as its weight is; its count of steps is one number and is not."""
    if not isinstance(weight, DTensor) or not value.dim():
        return value
    return DTensor.from_local(
        value.to(weight.device),
        weight.device_mesh,
        weight.placements,
        shape=weight.shape,
        stride=weight.stride(),
    )
