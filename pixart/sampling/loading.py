"""What is sampled from: a checkpoint's average or master weights, or its linears in FP8 with calibrated scales."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import WEIGHTS, load_tensors
from pixart.data.encoders.text_encoder import Encoder, load_text_model
from pixart.data.encoders.vae import load_vae
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT, load_model, own_config
from pixart.model.fp8 import linear
from pixart.model.fp8.ops import E4M3, INPUT, WEIGHT
from pixart.model.fp8.plan import Plan
from pixart.sampling.pipeline import PixArtPipeline

RECORD = "inference.json"
WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"


def find(path: str | Path) -> Path:
    """FP8 weights, else the checkpoint that `path` means; ValueError where it is neither."""
    return Path(path) if (Path(path) / RECORD).exists() else checkpoints.find(path)


def load(directory: Path, weights: str = "ema") -> tuple[DiT, dict[str, Any]]:
    """The model, by `weights` ema or master, and a record with `stage`, `step`, `dataset` and `normalization`.

    FP8 weights are those of the average. Raises ValueError for weights that cannot be read.
    """
    if (directory / RECORD).exists():
        record = json.loads((directory / RECORD).read_text())
        return load_fp8(directory, record["linears"]), record
    checkpoint = checkpoints.load(directory)
    state = checkpoint.ema if weights == "ema" else checkpoint.model
    return load_model(checkpoint.config, state).eval(), checkpoints.read_record(directory)


def load_pipeline(directory: Path, weights: str, dataset: Manifest, *, both_halves: bool = False) -> PixArtPipeline:
    """The model with the VAE, the text encoder and the classes of a dataset, on the CPU but for the VAE.

    Of a text encoder that is half of an encoder-decoder, `both_halves` keeps the other one too: transformers can
    save and load such a model only as a whole.
    """
    model, record = load(directory, weights)
    normalization, data = checkpoints.normalization(record), dataset.data
    tokenizer, text_model = load_text_model(data.text_encoder) if model.stage == 2 else (None, None)
    if model.stage == 2 and not both_halves:
        text_model = Encoder(tokenizer, text_model, tokens=data.max_text_tokens, scale=data.text_scale).model
    return PixArtPipeline(
        transformer=model,
        vae=load_vae(data.vae),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_model,
        tokenizer=tokenizer,
        latents_mean=normalization.mean,
        latents_std=normalization.std,
        sample_size=dataset.latent_shape[1],
        text_tokens=data.max_text_tokens,
        text_scale=data.text_scale,
        id2label={str(index): name for index, name in enumerate(dataset.class_names)} if model.stage == 1 else None,
    )


def load_fp8(directory: Path, linears: Sequence[str]) -> DiT:
    """The model with `linears` in FP8."""
    state = load_tensors(directory / WEIGHTS)
    scales = {name: state.pop(f"{name}.{WEIGHT_SCALE}") for name in linears}
    inputs = {name: state.pop(f"{name}.{INPUT_SCALE}") for name in linears}
    weights = {
        name: tensor.float() / scales[name.removesuffix(".weight")] if tensor.dtype == E4M3.dtype else tensor.float()
        for name, tensor in state.items()
    }
    model = load_model(own_config(DiT.load_config(directory)), weights)
    linear.swap_linears(model, Plan(linears=tuple(linears)))
    for name, module in linear.float8_linears(model):
        module.scale[INPUT], module.scale[WEIGHT] = inputs[name], scales[name]
    return model.eval()
