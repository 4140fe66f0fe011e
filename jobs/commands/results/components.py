"""The dataset of a checkpoint, or the VAE and the text encoder that are named instead of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from jobs.commands.launching import resolve_paths
from jobs.commands.options import DATASET_KEY
from jobs.commands.results.sampling_checks import check_model
from jobs.state import ledger
from jobs.state.checkpoint_names import INFERENCE
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch
from jobs.submission.preflight import check_latents
from pixart import records
from pixart.config.aspect_buckets import Shape, bucket_shapes
from pixart.config.checkpoint_metadata import ModelRecord
from pixart.config.dataset import DataConfig
from pixart.config.keys.overrides import apply
from pixart.config.recipe import Recipe
from pixart.config.resolutions import check_multiples, check_trained, trained_shapes

WITHOUT_DATASET = ", or --vae and, for stage 2, --text-encoder"  # options that replace a dataset
BASE_LATENT_SIZE = "model.base_latent_size="  # read for files that do not record it


class DatasetOptions(Protocol):
    """The options that may name a checkpoint's dataset."""

    @property
    def names_dataset(self) -> bool: ...


class ComponentOptions(DatasetOptions, Protocol):
    """The options that name a checkpoint's dataset, or its VAE and text encoder."""

    @property
    def vae(self) -> str | None: ...
    @property
    def text_encoder(self) -> str | None: ...
    @property
    def overrides(self) -> tuple[str, ...]: ...


def open_components(
    launch: Launch, options: ComponentOptions, checkpoint: Path, record: dict[str, Any] | None
) -> tuple[list[str], int | None]:
    """Set the recipe's `data` to the dataset, or to the models that the options name, which the checkpoint needs.

    Returns the names of the classes and their number with the null class, None if it is not known. Raises ValueError if
    the checkpoint does not fit them.
    """
    if options.vae or options.text_encoder:
        launch.recipe = without_dataset(launch.recipe, options)
        return [], None
    manifest = open_training_dataset(launch, options, checkpoint, record, alternative=WITHOUT_DATASET)
    if not record:
        return manifest["class_names"], None
    model = check_checkpoint(checkpoint, record, launch.dataset, manifest)
    return manifest["class_names"], model.get("num_classes")


def check_checkpoint(
    checkpoint: Path, record: dict[str, Any], dataset: str, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Check that a checkpoint fits a dataset, and return the configuration of its model.

    Raises ValueError if it was trained on latents or text embeddings of another kind.
    """
    model = model_config(checkpoint, record)
    check_model(model, manifest, dataset)
    check_latents(str(checkpoint), record, dataset, manifest)
    return model


def model_config(checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the model of a checkpoint or of FP8 weights."""
    is_inference = (checkpoint / INFERENCE).exists()
    return records.read(checkpoint / "config.json", ModelRecord) if is_inference else record["config"]


def check_sizes(
    sizes: tuple[Shape, ...], data: DataConfig, checkpoint: Path, record: dict[str, Any] | None, *, force: bool
) -> None:
    """Check the sizes to sample; a checkpoint that does not record its shapes has those of `data`.

    Raises ValueError for a size that the checkpoint was not trained at, unless `force`, and for one that its patches
    do not divide, as far as that is known without the VAE.
    """
    shapes, factor = trained_shapes(record or {})
    if not force:
        square = (data.image_size, data.image_size)
        known = shapes or bucket_shapes(data.aspect_buckets, data.image_size) or (square,)
        check_trained(sizes, known, str(checkpoint))
    if record and shapes:
        check_multiples(sizes, factor * model_config(checkpoint, record)["patch_size"])


def base_latent_size(launch: Launch, options: ComponentOptions) -> int | None:
    """Return the size of the latents that a checkpoint was trained on if the options name it, else None."""
    names_size = any(item.startswith(BASE_LATENT_SIZE) for item in options.overrides)
    return launch.recipe.model.base_latent_size if names_size else None


def without_dataset(recipe: Recipe, options: ComponentOptions) -> Recipe:
    """Return the recipe with the VAE and the text encoder of the options, and an empty path of the dataset.

    The other keys of `data` have their defaults, and not the recipe's, unless an override sets them. Raises ValueError
    if the options name a dataset too, or do not name the VAE.
    """
    if options.names_dataset:
        raise ValueError("--vae and --text-encoder replace the dataset; give either these or --dataset")
    if not options.vae:
        raise ValueError("--text-encoder: without a dataset, the VAE is needed too; give --vae")
    overrides = [item for item in options.overrides if item.startswith("data.")]
    data = DataConfig(path="", vae=options.vae)
    if options.text_encoder:
        data = replace(data, text_encoder=options.text_encoder)
    return resolve_paths(apply(replace(recipe, data=data), overrides))


def open_training_dataset(
    launch: Launch, options: DatasetOptions, checkpoint: Path, record: dict[str, Any] | None, *, alternative: str = ""
) -> dict[str, Any]:
    """Return the manifest of the dataset that the options name, else of the one that the checkpoint was trained on.

    Sampling needs it for the VAE and the text encoder. Raises ValueError if the dataset is unknown or does not exist;
    `alternative` are the options of the command that replace the dataset, for the error's advice.
    """
    if not options.names_dataset:
        if not record or not record["dataset"]:
            raise ValueError(
                f"{checkpoint}: names no dataset, whose VAE and text encoder are needed; give --dataset{alternative}"
            )
        launch.recipe = apply(launch.recipe, [f"{DATASET_KEY}{record['dataset']}"])
    if ledger.manifest(launch.dataset) is None:
        raise ValueError(f"dataset {launch.dataset} does not exist; give its present path by --dataset{alternative}")
    return open_dataset(launch)
