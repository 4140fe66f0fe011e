"""DeepSpeed's files as it writes them: weights in bfloat16, the optimizer divided over two ranks."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversion.reading import formats
from tests.conversion.reading.test_world import BUFFERS, check_same

RANKS = 2


def groups_of(names: list[str]) -> list[list[str]]:
    return [
        [name for name in names if name.endswith("weight")],
        [name for name in names if not name.endswith("weight")],
    ]


def consecutive(tensors: list[Tensor]) -> list[Tensor]:
    """Return the parts of the ranks of stages 1 and 2: one vector, padded to a multiple of the ranks."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return list(torch.cat([flat, flat.new_zeros(-len(flat) % (2 * RANKS))]).chunk(RANKS))


def divided(tensors: list[Tensor]) -> list[Tensor]:
    """Return the parts of the ranks of stage 3: each parameter is padded and divided."""
    parts: list[list[Tensor]] = [[] for _ in range(RANKS)]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % RANKS)])
        for rank, part in enumerate(padded.chunk(RANKS)):
            parts[rank].append(part)
    return [torch.cat(part) for part in parts]


def write(folder: Path, stage1: Any, stage: int, *, prefix: str = "") -> None:
    folder.mkdir(parents=True)
    names = [name for name in stage1.model if name not in BUFFERS]
    groups = groups_of(names)
    split = divided if stage == 3 else consecutive
    content = {
        "module": OrderedDict((name, tensor.bfloat16()) for name, tensor in stage1.model.items())
        | {name: stage1.model[name] for name in BUFFERS},
        "buffer_names": list(BUFFERS),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, stage1.model[name].shape) for name in group) for group in groups],
        "frozen_param_shapes": None,
        "lr_scheduler": {"last_batch_iteration": 7},
        "global_steps": 8,
        "skipped_steps": 0,
        "dp_world_size": RANKS,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.18.0",
        "ema": stage1.ema,
    }
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save(content, folder / name)
    fields = {
        field: [split([tensor_of(stage1, name, field) for name in group]) for group in groups]
        for field in ("fp32", "exp_avg", "exp_avg_sq")
    }
    for rank in range(RANKS):
        moments = {
            index: {"step": torch.tensor(8.0), **{key: fields[key][index][rank] for key in ("exp_avg", "exp_avg_sq")}}
            for index in range(len(groups))
        }
        weights = [parts[rank] for parts in fields["fp32"]]
        base = {"state": moments, "param_groups": [{"lr": 1e-4}] * len(groups)}
        state = (
            {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": weights, "optimizer_state_dict": base}
            if stage == 3
            else {
                "zero_stage": stage,
                "partition_count": [RANKS] * len(groups),
                "single_partition_of_fp32_groups": weights,
                "base_optimizer_state": base,
                "group_paddings": [0] * len(groups),
            }
        )
        path = folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.18.0"}, path)


def tensor_of(stage1: Any, name: str, field: str) -> Tensor:
    return stage1.model[name] if field == "fp32" else stage1.optimizer[f"{name}.{field}"]


@pytest.mark.parametrize(("stage", "prefix"), [(1, "bf16_"), (2, ""), (3, "")])
def test_ranks_are_joined(stage1, tmp_path, stage, prefix):
    """The weights are those in float32, and not those in bfloat16 that the model's file has."""
    write(tmp_path / "run/global_step8", stage1, stage, prefix=prefix)
    (tmp_path / "run/latest").write_text("global_step8")
    for path in (tmp_path / "run", tmp_path / "run/global_step8"):
        read = formats.read(path, base_latent_size=8)
        check_same(read, stage1)
        assert "ds_version" in read.provenance["unused_entries"]["names"]


def test_refused_by_their_cause(stage1, tmp_path):
    write(tmp_path / "a", stage1, 2)
    (tmp_path / "a/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="has the optimizer of 1 ranks of 2"):
        formats.read(tmp_path / "a")
    write(tmp_path / "b", stage1, 2)
    torch.save({}, tmp_path / "b/mp_rank_01_model_states.pt")
    with pytest.raises(ValueError, match="tensor parallelism"):
        formats.read(tmp_path / "b")
    write(tmp_path / "c", stage1, 2)
    path = tmp_path / "c/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [torch.zeros(3)] * 2
    torch.save(content, path)
    with pytest.raises(ValueError, match="do not fit the shapes of the parameters") as caught:
        formats.read(tmp_path / "c")
    assert "\n" not in str(caught.value)
