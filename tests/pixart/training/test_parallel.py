"""Ranks: FSDP2 against one plain process, any number of them against one, and what each of them keeps."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from pixart.config.recipe import from_json, to_json
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.loading.sampler import held_out_rows
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT
from pixart.training.conditioning import TextCondition
from pixart.training.loop import Stopped, train
from pixart.training.metrics import Quiet
from pixart.training.process_group import process_group
from pixart.training.trainer import Training
from tests.support import ranks


class Told(Quiet):
    def __init__(self, run: Path) -> None:
        self.file = run / "told.jsonl"

    def metrics(self, step, values):
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def told(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "told.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def train_child(recipe_json: str, run: str, last: int) -> None:
    """Trains to the end of step `last`, as one that a cluster asks to end then."""
    recipe = from_json(recipe_json)
    begun = max((int(path.name.removeprefix("step-")) for path in Path(run).glob("checkpoints/step-*")), default=0)
    done = itertools.count(begun + 1)
    with contextlib.suppress(Stopped):
        train(
            stage=1,
            model=recipe.model,
            config=recipe.stage1,
            dataset=recipe.data.path,
            run=run,
            reporter=Told(Path(run)),
            stop=lambda: int(next(done) == last),
        )


def with_stage1(recipe, **changes):
    return dataclasses.replace(recipe, stage1=dataclasses.replace(recipe.stage1, **changes))


def losses(recipe, run: Path, world: int, *, last: int = 0, nodes: int = 1, **changes) -> dict[int, float]:
    run.mkdir(exist_ok=True)
    ranks.run(world, train_child, to_json(with_stage1(recipe, **changes)), str(run), last, nodes=nodes)
    return told(run, "train/loss")


LONG = {"steps": 24, "save_every": 6, "validate_every": 6, "num_validation_samples": 8}


@pytest.fixture(scope="module")
def alone(small_recipe, tmp_path_factory) -> dict[int, float]:
    return losses(small_recipe, tmp_path_factory.mktemp("alone"), 1, **LONG)


def close(one: dict[int, float], other: dict[int, float]) -> bool:
    return one.keys() == other.keys() and all(one[step] == pytest.approx(other[step], rel=1e-4) for step in one)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_what_another_saved(small_recipe, alone, tmp_path):
    """4, 2, 8 and 1 of them, one after the other, in one run."""
    for last, world in ((6, 4), (12, 2), (18, 8), (24, 1)):
        found = losses(small_recipe, tmp_path, world, last=last, **LONG)
        assert max(found) == last
    assert close(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "nodes", "changes"),
    [
        (1, 1, {"gradient_accumulation_steps": 4}),
        (2, 1, {"gradient_accumulation_steps": 2, "reshard_after_forward": False}),
        (4, 2, {"sharding": "hsdp"}),
        (1, 1, {"activation_checkpointing": "full"}),
        (2, 1, {"activation_checkpointing": "selective"}),
    ],
)
def test_how_the_work_is_dealt_out_changes_nothing(small_recipe, alone, tmp_path, world, nodes, changes):
    found = losses(small_recipe, tmp_path, world, nodes=nodes, **LONG, **changes)
    assert close(found, alone)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_compiled_blocks_give_the_same_losses(small_recipe, alone, tmp_path):
    """Until the rounding of fused kernels, which differs, has grown by steps of a large learning rate."""
    found = losses(small_recipe, tmp_path, 2, **LONG, compile=True)
    assert found.keys() == alone.keys()
    assert all(found[step] == pytest.approx(alone[step], rel=1e-4) for step in range(1, 7))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_one_pass_of_sharded_weights_gives_the_same_losses(small_recipe, alone, tmp_path):
    assert close(losses(small_recipe, tmp_path, 2, **LONG, fused_adamw_ema=True), alone)


def text_child(recipe_json: str, file: str) -> None:
    """The states of a batch's captions by the encoder."""
    recipe = from_json(recipe_json)
    with process_group() as group:
        store = Store(manifests.read(recipe.data.path))
        manifest = dataclasses.replace(
            store.manifest, data=dataclasses.replace(store.manifest.data, store_text_embeddings=False)
        )
        condition = TextCondition(manifest, group, recipe.stage2)
        found = condition(Loader(store, batch=8, seed=0, drop=0.2).read(0))
        kept = sum(
            parameter.to_local().nbytes
            for parameter in condition.encoder.model.parameters()
            if isinstance(parameter, DTensor)
        )
        if group.first:
            torch.save({**found, "bytes": torch.tensor(kept)}, file)


@pytest.mark.slow
def test_a_sharded_text_encoder_says_the_same(small_recipe, tmp_path):
    found = []
    for world, shard in ((1, False), (2, True)):
        stage2 = dataclasses.replace(small_recipe.stage2, shard_text_encoder=shard)
        file = tmp_path / f"{world}.pt"
        ranks.run(world, text_child, to_json(dataclasses.replace(small_recipe, stage2=stage2)), str(file))
        found.append(torch.load(file, weights_only=True))
    replicated, sharded = found
    assert torch.allclose(replicated["text"], sharded["text"], atol=1e-5)
    assert torch.equal(replicated["text_mask"], sharded["text_mask"])
    assert replicated["bytes"] == 0
    assert 40e6 < sharded["bytes"] < 50e6  # MiniLM's 91 MB by two


def gradients_child(recipe_json: str, folder: str) -> None:
    """Saves the gradients of a step, whole, and the bytes of what this rank keeps."""
    recipe = from_json(recipe_json)
    with process_group() as group:
        store = Store(manifests.read(recipe.data.path))
        training = Training(None, 1, recipe.model, recipe.stage1, store, group)
        loader = Loader(
            store, batch=recipe.stage1.global_batch_size, seed=0, drop=0.1, rank=group.rank, world=group.world
        )
        training.optimizer.zero_grad = lambda: None  # they are looked at afterwards
        training.step(loader.read(0))
        parameters = dict(training.model.named_parameters())
        whole = {name: parameter.grad.full_tensor() for name, parameter in parameters.items()}
        kept = [parameter.to_local() for parameter in parameters.values()]
        kept += [parameter.grad.to_local() for parameter in parameters.values()]
        kept += [
            training.optimizer.state[parameter][moment].to_local()
            for parameter in parameters.values()
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        own = sum(tensor.nbytes for tensor in kept)
        Path(folder, f"bytes-{group.rank}").write_text(str(own))
        if group.first:
            torch.save(whole, Path(folder, "gradients.pt"))


@pytest.mark.slow
def test_gradients_and_memory_of_four_ranks(small_recipe, tmp_path):
    """Against plain autograd in one process over the same global batch."""
    recipe = with_stage1(small_recipe, max_grad_norm=1e9, cond_dropout_prob=0.1)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dim=128))
    ranks.run(4, gradients_child, to_json(recipe), str(tmp_path))

    config, store = recipe.stage1, Store(manifests.read(recipe.data.path))
    torch.manual_seed(config.seed)
    sizes = recipe.model.dit_arguments()
    model = DiT(**sizes)
    batch = Loader(store, batch=config.global_batch_size, seed=0, drop=0.1).read(0)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in store.statistics())
    data = (batch.latents.float() - mean) / std
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"0 0").digest()[:7]))
    noise = torch.randn(data.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(data), generator=generator))
    label = torch.where(batch.dropped, sizes["num_classes"] - 1, batch.label.long())
    spread = t.view(-1, 1, 1, 1)
    velocity = model(spread * data + (1 - spread) * noise, t, label=label)
    (velocity - (data - noise)).pow(2).mean().backward()

    sharded = torch.load(tmp_path / "gradients.pt", weights_only=True)
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert sharded.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = max(gradient.norm().item(), 1e-12)
        assert (sharded[name] - gradient).norm() <= 1e-5 * scale, name

    total = 4 * sum(parameter.nbytes for parameter in model.parameters())
    for rank in range(4):
        assert int(Path(tmp_path, f"bytes-{rank}").read_text()) <= 1.15 * total / 4


@pytest.mark.slow
def test_validation_is_the_same_for_any_number_of_ranks_and_its_rows_are_never_trained_on(small_recipe, tmp_path):
    changes = {"steps": 6, "validate_every": 6, "num_validation_samples": 6}
    found = []
    for world in (1, 4):
        losses(small_recipe, tmp_path / str(world), world, **changes)
        found.append({name: told(tmp_path / str(world), name) for name in ("val/loss", "val/loss_ema")})
    for name in found[0]:
        assert close(found[0][name], found[1][name])
    store = Store(manifests.read(small_recipe.data.path))
    held_out = held_out_rows(store.valid_rows(), 6)
    assert len(set(held_out.tolist())) == 6
    loader = Loader(store, batch=8, seed=0, held_out=held_out)
    taken = {row for step in range(20) for row in loader.read(step).rows.tolist()}
    assert taken == set(store.valid_rows().tolist()) - set(held_out.tolist())
