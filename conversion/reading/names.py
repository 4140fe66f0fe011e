"""Names of the parts of a checkpoint, and of parameters without those of the modules that wrap the model."""

import re
from collections.abc import Iterable

MODEL, EMA, OPTIMIZER, STEP = "model", "model_ema", "optimizer", "step"
PARAMETER = "patchify.weight"  # every model has it
NETWORKS = frozenset(
    (
        *("model", "module", "net", "network", "transformer", "dit", "denoiser", "unet", "backbone", "params"),
        *("generator", "diffusion", "score", "velocity"),
    )
)
SUFFIXES = NETWORKS | frozenset(
    ("state", "states", "dict", "sd", "statedict", "parameters", "param", "weights", "modules", "raw")
)
AVERAGES = frozenset(("ema", "averaged", "average", "avg", "swa", "shadow", "polyak"))
OPTIMIZERS = frozenset(("opt", "optim", "optimizer", "optimizers", "optimiser", "adam", "adamw"))
# Names of the step, of which the first that a file has is taken.
STEPS = (
    *("step", "steps", "global_step", "global_steps", "train_step", "train_steps", "training_step", "training_steps"),
    *("trained_steps", "completed_steps", "current_step", "cur_step", "last_step", "num_steps", "n_steps"),
    *("optimizer_step", "update_step", "num_updates", "iteration", "iterations", "iter", "iters", "it", "iter_num"),
    *("n_iter", "num_iter", "num_iters", "num_iterations", "global_iter", "current_iter", "cur_iter"),
    "current_iteration",
)
# Modules of torch.compile, DDP, FSDP, activation checkpointing and DeepSpeed, and attributes that hold the model.
WRAPPERS = frozenset(
    (
        *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
        *("_fpw_module", "model", "net", "network", "transformer", "dit", "denoiser", "unet", "backbone", "generator"),
        *("diffusion_model", "denoise_fn", "base_model", "inner_model", "wrapped_model", "_model", "_module"),
    )
)
EMA_MODULES = frozenset(
    (
        *("ema", "ema_model", "model_ema", "averaged_model", "average_model", "swa_model", "shadow"),
        *(f"ema_{name}" for name in ("net", "network", "transformer", "dit")),
        *(f"{name}_ema" for name in ("net", "network", "transformer", "dit")),
    )
)
ONLINE_MODULES = frozenset({"online_model"})  # of ema_pytorch, which keeps the trained model beside its EMA


def snake_case(name: str) -> str:
    """Return a name such as `globalStep` or `global-step` as `global_step`."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def kind_of(name: str) -> str | None:
    """Return the kind of part that the name of an entry stands for, or None."""
    if snake_case(name) in STEPS:
        return STEP
    words = {word for word in re.split(r"[^a-z]+", snake_case(name)) if word}
    if words & OPTIMIZERS and words <= OPTIMIZERS | SUFFIXES:
        return OPTIMIZER
    if words & AVERAGES and words <= AVERAGES | SUFFIXES:
        return EMA
    if words <= SUFFIXES and (words & NETWORKS or words >= {"state", "dict"} or "statedict" in words):
        return MODEL
    return None


def bare_name(key: str) -> str:
    """Return a parameter's name without the names of wrappers, wherever they are in it."""
    *modules, name = key.split(".")
    wrappers = WRAPPERS | EMA_MODULES | ONLINE_MODULES
    return ".".join([*(module for module in modules if module not in wrappers), name])


def bare_names(keys: Iterable[str], origin: str) -> dict[str, str]:
    """Return the stored key of each parameter's name. Raises ValueError, naming both, if two keys become one."""
    names: dict[str, str] = {}
    for key in keys:
        name = bare_name(key)
        if name in names:
            raise ValueError(
                f"{origin}: {names[name]!r} and {key!r} are both the parameter {name!r}; remove one of them"
            )
        names[name] = key
    return names
