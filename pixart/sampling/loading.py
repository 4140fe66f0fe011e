"""Loading of models for sampling: EMA or master weights of a checkpoint, or FP8 weights with calibrated scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pixart import records
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import WEIGHTS
from pixart.checkpoint.integrity import check_files
from pixart.checkpoint.safetensors_stream import load_tensors
from pixart.config.aspect_buckets import Shape
from pixart.config.checkpoint_metadata import InferenceRecord
from pixart.config.dataset import DataConfig
from pixart.config.latent_space import check_latent_space
from pixart.config.resolutions import AUTO, nearest_to_square, recorded_time_shift, time_shift, trained_shapes
from pixart.data.encoders.fingerprint import fingerprint
from pixart.data.encoders.text_encoder import Encoder, encoder_path, load_text_model, text_dim
from pixart.data.encoders.vae import latent_shape, load_vae, vae_path
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT, load_model, public_config
from pixart.model.fp8 import linear
from pixart.model.fp8.ops import E4M3, INPUT, WEIGHT
from pixart.model.fp8.plan import Plan
from pixart.sampling.denoise import make_scheduler
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
        metadata = read_inference_record(directory)
        return load_fp8(directory, metadata["linears"]), metadata
    checkpoint = checkpoints.load(directory)
    state = checkpoint.ema if weights == "ema" else checkpoint.model
    return load_model(checkpoint.config, state).eval(), checkpoints.read_metadata(directory)


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """What a pipeline needs beside the transformer: of a dataset, or of a configuration without a dataset."""

    data: DataConfig  # names the VAE and the text encoder, with its number of tokens and scale
    latent_size: Shape  # of an image of a checkpoint that does not record the shapes that it was trained at
    models: Mapping[str, str]  # fingerprints of the VAE and the text encoder
    class_names: tuple[str, ...] = ()

    @classmethod
    def of_dataset(cls, dataset: Manifest) -> Self:
        """Return the components of a dataset."""
        return cls(
            data=dataset.data,
            latent_size=nearest_to_square([(height, width) for _, height, width in dataset.latent_shapes]),
            models=dataset.models,
            class_names=dataset.class_names,
        )

    @classmethod
    def of_config(cls, data: DataConfig, stage: int) -> Self:
        """Return the components that a configuration names for a stage. Raises ValueError for an unknown model."""
        models = {"vae": fingerprint(vae_path(data.vae))}
        if stage == 2:
            models["text_encoder"] = fingerprint(encoder_path(data.text_encoder))
        _, height, width = latent_shape(data.vae, data.image_size)
        return cls(data=data, latent_size=(height, width), models=models)


def load_pipeline(
    directory: Path, weights: str, dataset: Manifest, *, keep_text_decoder: bool = False
) -> PixArtPipeline:
    """Load a pipeline of a checkpoint, or of FP8 weights, with the components of a dataset."""
    model, record = load(directory, weights)
    return build_pipeline(
        model, record, Components.of_dataset(dataset), name=str(directory), keep_text_decoder=keep_text_decoder
    )


def build_pipeline(
    model: DiT, record: Mapping[str, Any], components: Components, *, name: str, keep_text_decoder: bool = False
) -> PixArtPipeline:
    """Return a pipeline of a model and its record, which `load` returns, with the given components.

    The VAE is on the GPU if there is one, everything else on the CPU. `name` is the checkpoint's, for errors.
    `keep_text_decoder` keeps the decoder of an encoder-decoder text model, which transformers needs to save it. Raises
    ValueError if the components are of another pixel range, VAE or text encoder than those of the training data.
    """
    data, normalization = components.data, checkpoints.normalization_of(record)
    check_latent_space(
        name,
        normalization.pixel_range,
        record.get("provenance", {}).get("models", {}),
        data.path,
        data.pixel_range,
        components.models,
    )
    if (channels := latent_shape(data.vae, data.image_size)[0]) != model.config.in_dim:
        raise ValueError(f"data.vae={data.vae}: has {channels} latent channels; {name} reads {model.config.in_dim}")
    if model.stage == 2 and (width := text_dim(data.text_encoder)) != model.config.text_dim:
        raise ValueError(
            f"data.text_encoder={data.text_encoder}: has embeddings of width {width}; {name} reads "
            f"{model.config.text_dim}"
        )
    shapes, factor = trained_shapes(record)
    height, width = components.latent_size
    if shapes:
        height, width = (side // factor for side in nearest_to_square(shapes))
    shift = recorded_time_shift(record)
    tokenizer, text_model = load_text_model(data.text_encoder) if model.stage == 2 else (None, None)
    if model.stage == 2 and not keep_text_decoder:
        text_model = Encoder(tokenizer, text_model, max_tokens=data.max_text_tokens, scale=data.text_scale).model
    return PixArtPipeline(
        transformer=model,
        vae=load_vae(data.vae),
        scheduler=make_scheduler(time_shift(shift, height, width, model.config.base_image_size)),
        text_encoder=text_model,
        tokenizer=tokenizer,
        latents_mean=normalization.mean,
        latents_std=normalization.std,
        pixel_range=normalization.pixel_range,
        sample_size=height if height == width else (height, width),
        shift_by_area=shift == AUTO,
        text_tokens=data.max_text_tokens,
        text_scale=data.text_scale,
        id2label={str(index): name for index, name in enumerate(components.class_names)} if model.stage == 1 else None,
    )


def read_inference_record(directory: Path) -> dict[str, Any]:
    """Return the record of FP8 weights, and check it and all files. Raises ValueError for an altered one.

    Weights that version 0.1 exported have no checksums.
    """
    file = directory / INFERENCE_FILE
    metadata = records.read(file, InferenceRecord)
    if "files" in metadata or records.CHECKSUM in metadata:
        records.check(metadata, str(file))
        check_files(directory, metadata["files"])
    return metadata


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
