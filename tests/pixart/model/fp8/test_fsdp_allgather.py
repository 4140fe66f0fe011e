"""Weights gathered in FP8 by FSDP2, against a model that is not sharded."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pixart.model.dit import DiT
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.fsdp_allgather import gather_as_given, gather_in_fp8
from pixart.training.ema import reshard, set_weights
from pixart.training.parallelize import recomputed
from pixart.training.process_group import process_group, whole
from tests.support import ranks
from tests.support.fp8_models import fp8_model, inputs, plan_of

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
FALLS = "dit_blocks.0.mlp.linear1"


def sharded(how: dict) -> DiT:
    model = fp8_model(2)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.dit_blocks:
        if "recompute" in how:
            block.forward = recomputed(how["recompute"], block.forward)
        if "backend" in how:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=how["backend"])
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    gather_in_fp8(model, torch.float32)
    return model


def trained(model: DiT, falls_at: int = -1) -> dict[str, torch.Tensor]:
    """Losses, the last gradients and scales of six steps of two micro-batches; a linear may leave FP8 before one."""
    plan, optimizer = plan_of(model), torch.optim.SGD(model.parameters(), lr=0.05)
    x, t, text, mask = inputs()
    found: dict[str, torch.Tensor] = {}
    for step in range(6):
        if step == falls_at:
            linear = model.get_submodule(FALLS)
            linear.in_fp8, linear.gathered = False, None
            if hasattr(model, "set_requires_gradient_sync"):
                gather_as_given(model, FALLS)
        optimizer.zero_grad()
        for last in (False, True):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            loss = model(x, t, text=text, text_mask=mask).square().mean() / 2
            loss.backward()
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
        scaling.update_scales(model, plan)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    found |= {name: whole(parameter.grad) for name, parameter in parameters.items()}
    with torch.no_grad():
        found["without gradients"] = model(x, t, text=text, text_mask=mask)
        reshard(model)
        set_weights(model, {name: 1.5 * parameter for name, parameter in model.named_parameters()})
        found["with other weights"] = model(x, t, text=text, text_mask=mask)
    return {**found, **scaling.scale_state(model)}


def child(how: dict, file: str) -> None:
    with process_group() as group:
        found = trained(sharded(how), how.get("falls_at", -1))
        if group.first:
            torch.save(found, file)


@pytest.mark.parametrize(
    ("world", "how", "most"),
    [
        (1, {}, 1e-6),
        pytest.param(4, {}, 1e-6, marks=pytest.mark.slow),
        pytest.param(5, {"recompute": "full"}, 2e-3, marks=pytest.mark.slow),  # 48 rows: not all have as many
        pytest.param(2, {"recompute": "selective"}, 1e-6, marks=pytest.mark.slow),
        pytest.param(2, {"falls_at": 3}, 1e-6, marks=pytest.mark.slow),
        pytest.param(2, {"backend": "aot_eager", "recompute": "selective"}, 2e-3, marks=pytest.mark.slow),
        pytest.param(2, {"backend": "inductor"}, 2e-3, marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_the_same_as_unsharded(tmp_path, world, how, most):
    """Losses, gradients, scales and histories, within `most` of each tensor's norm.

    Where a compiled kernel, or a mean over five, rounds another way, the next cast may make a step of FP8 of it.
    """
    ranks.run(world, child, how, str(tmp_path / "found.pt"))
    found = torch.load(Path(tmp_path, "found.pt"), weights_only=True)
    torch.set_num_threads(1)  # as the ranks: sums in another order may become a step of FP8
    alone = trained(fp8_model(2), how.get("falls_at", -1))
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        assert (found[name] - tensor).norm() <= most * tensor.norm() + 1e-12, name


def counted_child(file: str) -> None:
    """How often weights are cast in a step of three micro-batches, and what each is gathered as."""
    from pixart.model.fp8 import fsdp_allgather

    casts, real = [], fsdp_allgather.quantize

    def quantize(*arguments):
        casts.append(1)
        return real(*arguments)

    with process_group() as group:
        model = sharded({})
        fsdp_allgather.quantize = quantize
        x, t, text, mask = inputs()
        for _ in range(3):
            model(x, t, text=text, text_mask=mask).square().mean().backward()
        model.unshard()
        for block in model.dit_blocks:
            block.unshard()
        kinds = {str(linear.weight.dtype) for _, linear in fp8.float8_linears(model)}
        if group.first:
            Path(file).write_text(f"{len(casts) / len(plan_of(model).linears)} {kinds}")


def test_a_weight_is_cast_once_a_step_and_moves_in_fp8(tmp_path):
    ranks.run(1, counted_child, str(tmp_path / "counted"))
    assert (tmp_path / "counted").read_text() == "1.0 {'torch.float8_e4m3fn'}"
