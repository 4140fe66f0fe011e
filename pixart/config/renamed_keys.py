"""Translation of records that name configuration keys as version 0.1 did: run folders, manifests and run metadata.

Raises TypeError for a section that is no object, or that has a key under both of its names.
"""

from collections.abc import Callable, Mapping
from typing import Any

Values = Mapping[str, Any]

DATA = {
    "shards": "num_shards",
    "images": "max_images",
    "text_tokens": "max_text_tokens",
    "text_states": "store_text_embeddings",
}
SCREENING = {"plain": "solid_color_fraction", "near_plain": "uniform_area_fraction"}
MODEL = {"base_image_size": "base_latent_size"}
STAGE = {
    "batch": "global_batch_size",
    "warmup": "warmup_steps",
    "final_lr": "min_lr_ratio",
    "clip": "max_grad_norm",
    "ema": "ema_decay",
    "drop": "cond_dropout_prob",
    "short": "short_caption_prob",
    "fp8_weight_gradient": "fp8_grad_weight",
    "skip_limit": "max_skipped_steps",
    "accumulate": "gradient_accumulation_steps",
    "reshard": "reshard_after_forward",
    "one_pass": "fused_adamw_ema",
    "attention": "attention_backend",
    "text_encoder": "shard_text_encoder",
    "fp8_every": "fp8_log_every",
    "validation_rows": "num_validation_samples",
    "previews": "num_previews",
    "stall_minutes": "hang_timeout_minutes",
    "profile": "profile_step",
}
STAGE_VALUES: dict[str, dict[str, Any]] = {
    "sharding": {"full": "fsdp", "hybrid": "hsdp"},
    "attention_backend": {"measured": "autotune", "torch": "default"},
    "shard_text_encoder": {"replicated": False, "sharded": True},
}


def rename_data(values: Values) -> dict[str, Any]:
    """Return the values of a `data` section under today's keys; those that have them already stay."""
    return _rename_data(values, _rename)


def original_data(values: Values) -> dict[str, Any]:
    """Return the inverse of `rename_data`: the section as version 0.1 wrote and hashed it."""
    return _rename_data(values, lambda section, names: _rename(section, {new: old for old, new in names.items()}))


def rename_model(values: Values) -> dict[str, Any]:
    """Return the values of a `model` section under today's keys."""
    return _rename(values, MODEL)


def rename_stage(values: Values) -> dict[str, Any]:
    """Return the values of a `stage1` or `stage2` section, or the logged ones of a training run, under today's keys."""
    renamed = _rename(values, STAGE)
    for key, meanings in STAGE_VALUES.items():
        if isinstance(renamed.get(key), str):
            renamed[key] = meanings.get(renamed[key], renamed[key])
    return renamed


def rename_recipe(values: Values) -> dict[str, Any]:
    """Return the values of a complete recipe, such as those of a run's `config.json`, under today's keys."""
    return {
        **values,
        "data": rename_data(values["data"]),
        "model": rename_model(values["model"]),
        "stage1": rename_stage(values["stage1"]),
        "stage2": rename_stage(values["stage2"]),
    }


def _rename(section: Values, names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise TypeError(f"a section is {type(section).__name__}, not an object")
    if doubled := [old for old, new in names.items() if old in section and new in section]:
        raise TypeError(f"a section has both {doubled[0]} and {names[doubled[0]]}")
    return {names.get(key, key): value for key, value in section.items()}


def _rename_data(values: Values, rename: Callable[[Values, Mapping[str, str]], dict[str, Any]]) -> dict[str, Any]:
    renamed = rename(values, DATA)
    if "screening" in renamed:
        renamed["screening"] = rename(renamed["screening"], SCREENING)
    return renamed
