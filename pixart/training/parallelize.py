"""Recomputation, compilation and FSDP2 around a model."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pixart.config.training import TrainConfig
from pixart.model.fp8 import ops  # noqa: F401 - its operator is one of those below
from pixart.training.process_group import Ranks

aten = torch.ops.aten
# Products and attention: what costs most to compute again. Norms, modulations and activations are made anew.
KEPT = (aten.mm, aten.addmm, aten.bmm, aten._scaled_mm, torch.ops.pixart.tensor_core_product)
ATTENTION = "_scaled_dot_product"
GRAPHS = 64  # of a block: training, validation and previews, lengths of text, a linear that has left FP8


def parallelize(model: nn.Module, ranks: Ranks, config: TrainConfig) -> None:
    """Recomputation, compilation and FSDP2, in this order and in place: each block a unit, the rest another.

    Master weights stay float32; computation is in `config.precision`.
    """
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
    # In one piece, but for TransformerEngine's linears, which run outside of a compiled graph.
    whole = not any("transformer_engine" in type(module).__module__ for module in model.modules())
    for block in model.dit_blocks:
        if config.activation_checkpointing != "none":
            block.forward = recomputed(config.activation_checkpointing, block.forward)
        if config.compile:
            block.forward = torch.compile(block.forward, fullgraph=whole)
    # Time stays float32 on its way in: the model casts what it multiplies with weights.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(config.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = make_mesh(ranks, config.sharding)
    for block in model.dit_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)


def shard_frozen(model: nn.Module, ranks: Ranks) -> None:
    """FSDP2 around a model that is not trained, in place: each item of its lists of layers a unit, the rest another."""
    mesh = make_mesh(ranks, "fsdp")
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_mesh(ranks: Ranks, sharding: str) -> DeviceMesh:
    """Return a mesh over all ranks; with `hsdp` on several nodes, of (replicas over nodes, shards within a node)."""
    kind, nodes = ranks.device.type, ranks.world // ranks.local_world
    if sharding == "hsdp" and nodes > 1:
        return init_device_mesh(kind, (nodes, ranks.local_world), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (ranks.world,))


def recomputed(how: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose activations are computed again backward: `full` all, `selective` the cheap ones."""
    if how == "full":
        return functools.partial(checkpoint, forward, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, keeps_products)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def keeps_products(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    packet = getattr(operator, "overloadpacket", operator)
    kept = packet in KEPT or ATTENTION in str(packet)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
