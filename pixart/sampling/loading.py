"""Loading of models for sampling: EMA or master weights of a checkpoint, or FP8 weights with calibrated scales."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import WEIGHTS
from pixart.checkpoint.latent_space import check_latent_space
from pixart.checkpoint.safetensors_stream import load_tensors
from pixart.data.encoders.text_encoder import Encoder, load_text_model
from pixart.data.encoders.vae import load_vae
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT, load_model, public_config
from pixart.model.fp8 import linear
from pixart.model.fp8.ops import E4M3, INPUT, WEIGHT
from pixart.model.fp8.plan import Plan
from pixart.sampling.pipeline import PixArtPipeline

INFERENCE_FILE = "inference.json"
WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"


def find(path: str | Path) -> Path:
    """Return the directory of FP8 weights or of the checkpoint that a path refers to.

    Raises ValueError if it is neither.
    """
    return Path(path) if (Path(path) / INFERENCE_FILE).exists() else checkpoints.find(path)


def load(directory: Path, weights: str = "ema") -> tuple[DiT, dict[str, Any]]:
    """Load a model and its record, which has `stage`, `step`, `dataset` and `normalization`.

    `weights` is ema or master; FP8 weights are always EMA weights. Raises ValueError if the weights cannot be read.
    """
    if (directory / INFERENCE_FILE).exists():
        record = json.loads((directory / INFERENCE_FILE).read_text())
        return load_fp8(directory, record["linears"]), record
    checkpoint = checkpoints.load(directory)
    state = checkpoint.ema if weights == "ema" else checkpoint.model
    return load_model(checkpoint.config, state).eval(), checkpoints.read_metadata(directory)


def load_pipeline(
    directory: Path, weights: str, dataset: Manifest, *, keep_text_decoder: bool = False
) -> PixArtPipeline:
    """Load a pipeline of a model with the VAE, the text encoder and the class names of a dataset.

    The VAE is on the GPU if there is one, everything else on the CPU. `keep_text_decoder` keeps the decoder of an
    encoder-decoder text model, which transformers needs to save it.
    """
    model, record = load(directory, weights)
    normalization, data = checkpoints.normalization_of(record), dataset.data
    models = record.get("provenance", {}).get("models", {})
    check_latent_space(str(directory), normalization.pixel_range, models, data.path, data.pixel_range, dataset.models)
    tokenizer, text_model = load_text_model(data.text_encoder) if model.stage == 2 else (None, None)
    if model.stage == 2 and not keep_text_decoder:
        text_model = Encoder(tokenizer, text_model, max_tokens=data.max_text_tokens, scale=data.text_scale).model
    return PixArtPipeline(
        transformer=model,
        vae=load_vae(data.vae),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_model,
        tokenizer=tokenizer,
        latents_mean=normalization.mean,
        latents_std=normalization.std,
        pixel_range=normalization.pixel_range,
        sample_size=dataset.latent_shape[1],
        text_tokens=data.max_text_tokens,
        text_scale=data.text_scale,
        id2label={str(index): name for index, name in enumerate(dataset.class_names)} if model.stage == 1 else None,
    )


def load_fp8(directory: Path, linears: Sequence[str]) -> DiT:
    """Load a model whose linears named in `linears` have FP8 weights and calibrated scales."""
    state = load_tensors(directory / WEIGHTS)
    scales = {name: state.pop(f"{name}.{WEIGHT_SCALE}") for name in linears}
    inputs = {name: state.pop(f"{name}.{INPUT_SCALE}") for name in linears}
    weights = {
        name: tensor.float() / scales[name.removesuffix(".weight")] if tensor.dtype == E4M3.dtype else tensor.float()
        for name, tensor in state.items()
    }
    model = load_model(public_config(DiT.load_config(directory)), weights)
    linear.swap_linears(model, Plan(linears=tuple(linears)))
    for name, module in linear.float8_linears(model):
        module.scale[INPUT], module.scale[WEIGHT] = inputs[name], scales[name]
    return model.eval()
