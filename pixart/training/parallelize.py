"""Activation recomputation, compilation and FSDP2 of a model."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pixart.config.training import TrainConfig
from pixart.model.dit import DiT
from pixart.model.fp8 import tensor_cores
from pixart.training.process_group import Ranks

aten = torch.ops.aten
# Selective recomputation saves the outputs of GEMMs and attention, which are expensive to recompute, and recomputes
# norms, modulations and activation functions.
SAVED_OPERATORS = (aten.mm, aten.addmm, aten.bmm, aten._scaled_mm, torch.ops.pixart.tensor_core_gemm)
ATTENTION_PREFIX = "_scaled_dot_product"
RECOMPILE_LIMIT = 64  # graphs per block: training, validation and previews, text lengths, linears fallen back to BF16


def parallelize(model: DiT, ranks: Ranks, config: TrainConfig) -> None:
    """Apply activation recomputation, compilation and FSDP2 in this order, in place.

    Each block is an FSDP2 unit, and the rest of the model is another. Master weights stay in float32; computation is in
    `config.precision`.
    """
    if config.compile:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        tensor_cores.register_lowerings()
    # TransformerEngine's linears run outside of compiled graphs.
    fullgraph = not any("transformer_engine" in type(module).__module__ for module in model.modules())
    for block in model.blocks:
        if config.activation_checkpointing != "none":
            recomputed = recompute_activations(config.activation_checkpointing, block.forward)
            block.forward = recomputed  # type: ignore[method-assign]
        if config.compile:
            block.forward = torch.compile(block.forward, fullgraph=fullgraph)  # type: ignore[method-assign]
    # Inputs are not cast: the time must stay in float32, and the model casts what it multiplies with weights.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = make_mesh(ranks, config.sharding)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)


def shard_frozen(model: nn.Module, ranks: Ranks) -> None:
    """Apply FSDP2 to a frozen model in place; each layer of its module lists is a unit, the rest another."""
    mesh = make_mesh(ranks, "fsdp")
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of `TrainConfig.precision`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_mesh(ranks: Ranks, sharding: str) -> DeviceMesh:
    """Return a mesh that shards over all ranks or, for `hsdp`, within a node with a replica on each node."""
    kind, nodes = ranks.device.type, ranks.world_size // ranks.local_world_size
    if sharding == "hsdp" and nodes > 1:
        return init_device_mesh(kind, (nodes, ranks.local_world_size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (ranks.world_size,))


def recompute_activations(mode: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` with activations recomputed in the backward pass: `full` all, `selective` the cheap ones."""
    if mode == "full":
        return functools.partial(checkpoint, forward, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, selective_policy)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def selective_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the outputs of SAVED_OPERATORS and attention; recompute all others."""
    packet = getattr(operator, "overloadpacket", operator)
    saved = packet in SAVED_OPERATORS or ATTENTION_PREFIX in str(packet)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
