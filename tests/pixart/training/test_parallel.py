"""Distributed training: FSDP2 against one process, any number of ranks against one, memory per rank."""

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
from pixart.data.loading.sampler import select_validation_rows
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT
from pixart.training.conditioning import TextConditioning
from pixart.training.loop import Stopped, train
from pixart.training.metrics import NullReporter
from pixart.training.process_group import process_group
from pixart.training.trainer import Trainer
from tests.support import ranks


class JsonReporter(NullReporter):
    """Reporter that appends metrics to `metrics.jsonl`."""

    def __init__(self, run: Path) -> None:
        self.file = run / "metrics.jsonl"

    def metrics(self, step, values):
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metric(run: Path, name: str) -> dict[int, float]:
    """Return the values of a metric by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def train_child(recipe_json: str, run: str, last_step: int) -> None:
    """Train until `last_step`, when the cluster asks the run to stop."""
    recipe = from_json(recipe_json)
    first_step = max((int(path.name.removeprefix("step-")) for path in Path(run).glob("checkpoints/step-*")), default=0)
    steps = itertools.count(first_step + 1)
    with contextlib.suppress(Stopped):
        train(
            stage=1,
            model=recipe.model,
            config=recipe.stage1,
            dataset=recipe.data.path,
            run=run,
            reporter=JsonReporter(Path(run)),
            stop=lambda: int(next(steps) == last_step),
        )


def with_stage1(recipe, **changes):
    return dataclasses.replace(recipe, stage1=dataclasses.replace(recipe.stage1, **changes))


def train_losses(
    recipe, run: Path, world_size: int, *, last_step: int = 0, nodes: int = 1, **changes
) -> dict[int, float]:
    """Train stage 1 with `world_size` ranks and return the losses by step."""
    run.mkdir(exist_ok=True)
    ranks.run(world_size, train_child, to_json(with_stage1(recipe, **changes)), str(run), last_step, nodes=nodes)
    return read_metric(run, "train/loss")


LONG = {"steps": 24, "save_every": 6, "validate_every": 6, "num_validation_samples": 8}


@pytest.fixture(scope="module")
def single_rank_losses(small_recipe, tmp_path_factory) -> dict[int, float]:
    return train_losses(small_recipe, tmp_path_factory.mktemp("single"), 1, **LONG)


def all_close(actual: dict[int, float], expected: dict[int, float]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[step] == pytest.approx(expected[step], rel=1e-4) for step in actual
    )


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(small_recipe, single_rank_losses, tmp_path):
    """One run with 4, 2, 8 and 1 ranks, one after the other."""
    for last_step, world_size in ((6, 4), (12, 2), (18, 8), (24, 1)):
        losses = train_losses(small_recipe, tmp_path, world_size, last_step=last_step, **LONG)
        assert max(losses) == last_step
    assert all_close(losses, single_rank_losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "nodes", "changes"),
    [
        (1, 1, {"gradient_accumulation_steps": 4}),
        (2, 1, {"gradient_accumulation_steps": 2, "reshard_after_forward": False}),
        (4, 2, {"sharding": "hsdp"}),
        (1, 1, {"activation_checkpointing": "full"}),
        (2, 1, {"activation_checkpointing": "selective"}),
    ],
)
def test_parallelism_does_not_change_the_losses(small_recipe, single_rank_losses, tmp_path, world_size, nodes, changes):
    losses = train_losses(small_recipe, tmp_path, world_size, nodes=nodes, **LONG, **changes)
    assert all_close(losses, single_rank_losses)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_compiled_blocks_give_the_same_losses(small_recipe, single_rank_losses, tmp_path):
    """In the first steps: fused kernels round differently, which a large learning rate amplifies."""
    losses = train_losses(small_recipe, tmp_path, 2, **LONG, compile=True)
    assert losses.keys() == single_rank_losses.keys()
    assert all(losses[step] == pytest.approx(single_rank_losses[step], rel=1e-4) for step in range(1, 7))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_fused_update_of_sharded_weights_gives_the_same_losses(small_recipe, single_rank_losses, tmp_path):
    losses = train_losses(small_recipe, tmp_path, 2, **LONG, fused_adamw_ema=True)
    assert all_close(losses, single_rank_losses)


def text_child(recipe_json: str, file: str) -> None:
    """Save the text embeddings of a batch, and the bytes of the encoder's shard on this rank."""
    recipe = from_json(recipe_json)
    with process_group() as group:
        store = Store(manifests.read(recipe.data.path))
        manifest = dataclasses.replace(
            store.manifest, data=dataclasses.replace(store.manifest.data, store_text_embeddings=False)
        )
        conditioning = TextConditioning(manifest, group, recipe.stage2)
        inputs = conditioning(Loader(store, global_batch_size=8, seed=0, cond_dropout_prob=0.2).read(0))
        shard_bytes = sum(
            parameter.to_local().nbytes
            for parameter in conditioning.encoder.model.parameters()
            if isinstance(parameter, DTensor)
        )
        if group.is_first:
            torch.save({**inputs, "bytes": torch.tensor(shard_bytes)}, file)


@pytest.mark.slow
def test_a_sharded_text_encoder_gives_the_same_embeddings(small_recipe, tmp_path):
    results = []
    for world_size, shard in ((1, False), (2, True)):
        stage2 = dataclasses.replace(small_recipe.stage2, shard_text_encoder=shard)
        file = tmp_path / str(world_size)
        ranks.run(world_size, text_child, to_json(dataclasses.replace(small_recipe, stage2=stage2)), str(file))
        results.append(torch.load(file, weights_only=True))
    replicated, sharded = results
    assert torch.allclose(replicated["text"], sharded["text"], atol=1e-5)
    assert torch.equal(replicated["text_mask"], sharded["text_mask"])
    assert replicated["bytes"] == 0
    assert 40e6 < sharded["bytes"] < 50e6  # half of MiniLM's 91 MB


def gradients_child(recipe_json: str, folder: str) -> None:
    """Save the unsharded gradients of a step, and the bytes of weights, gradients and moments on this rank."""
    recipe = from_json(recipe_json)
    with process_group() as group:
        store = Store(manifests.read(recipe.data.path))
        trainer = Trainer(None, 1, recipe.model, recipe.stage1, store, group)
        loader = Loader(
            store,
            global_batch_size=recipe.stage1.global_batch_size,
            seed=0,
            cond_dropout_prob=0.1,
            rank=group.rank,
            world_size=group.world_size,
        )
        trainer.optimizer.zero_grad = lambda: None  # keep the gradients
        trainer.train_step(loader.read(0))
        parameters = dict(trainer.model.named_parameters())
        grads = {name: parameter.grad.full_tensor() for name, parameter in parameters.items()}
        shards = [parameter.to_local() for parameter in parameters.values()]
        shards += [parameter.grad.to_local() for parameter in parameters.values()]
        shards += [
            trainer.optimizer.state[parameter][moment].to_local()
            for parameter in parameters.values()
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        shard_bytes = sum(tensor.nbytes for tensor in shards)
        Path(folder, f"bytes-{group.rank}").write_text(str(shard_bytes))
        if group.is_first:
            torch.save(grads, Path(folder, "gradients.pt"))


@pytest.mark.slow
def test_gradients_and_memory_of_four_ranks(small_recipe, tmp_path):
    """Gradients equal those of one process on the same global batch; memory per rank is a quarter."""
    recipe = with_stage1(small_recipe, max_grad_norm=1e9, cond_dropout_prob=0.1)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dim=128))
    ranks.run(4, gradients_child, to_json(recipe), str(tmp_path))

    config, store = recipe.stage1, Store(manifests.read(recipe.data.path))
    torch.manual_seed(config.seed)
    sizes = recipe.model.dit_arguments()
    model = DiT(**sizes)
    batch = Loader(store, global_batch_size=config.global_batch_size, seed=0, cond_dropout_prob=0.1).read(0)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in store.statistics())
    data = (batch.latents.float() - mean) / std
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"0 0").digest()[:7]))
    noise = torch.randn(data.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(data), generator=generator))
    label = torch.where(batch.dropped, sizes["num_classes"] - 1, batch.label.long())
    weights = t.view(-1, 1, 1, 1)
    velocity = model(weights * data + (1 - weights) * noise, t, label=label)
    (velocity - (data - noise)).pow(2).mean().backward()

    sharded = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert sharded.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.norm().item(), 1e-12)
        assert (sharded[name] - gradient).norm() <= 1e-5 * scale, name

    total = 4 * sum(parameter.nbytes for parameter in model.parameters())
    for rank in range(4):
        assert int(Path(tmp_path, f"bytes-{rank}").read_text()) <= 1.15 * total / 4


@pytest.mark.slow
def test_validation_is_independent_of_the_ranks_and_its_rows_are_excluded_from_training(small_recipe, tmp_path):
    changes = {"steps": 6, "validate_every": 6, "num_validation_samples": 6}
    single, distributed = {}, {}
    for world_size, metrics in ((1, single), (4, distributed)):
        run = tmp_path / str(world_size)
        train_losses(small_recipe, run, world_size, **changes)
        metrics.update({name: read_metric(run, name) for name in ("val/loss", "val/loss_ema")})
    for name in single:
        assert all_close(single[name], distributed[name])
    store = Store(manifests.read(small_recipe.data.path))
    validation_rows = select_validation_rows(store.valid_rows(), 6)
    assert len(set(validation_rows.tolist())) == 6
    loader = Loader(store, global_batch_size=8, seed=0, excluded_rows=validation_rows)
    trained = {row for step in range(20) for row in loader.read(step).rows.tolist()}
    assert trained == set(store.valid_rows().tolist()) - set(validation_rows.tolist())
