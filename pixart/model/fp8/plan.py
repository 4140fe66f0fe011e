"""Which linears run in FP8."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

ROWS = 16  # that a product of tensor cores takes at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which linears run in FP8, and how their scales follow the data."""

    linears: tuple[str, ...]  # module names
    kept: Mapping[str, str] = field(default_factory=dict)  # module name -> why it stays in BF16
    recipe: str = "delayed"
    history: int = 16  # rows of amax history, the staging row included
    margin: int = 0  # powers of two of headroom
    batch: int = 1  # images of a rank's step: gradients of a mean are in inverse proportion to it


def check_rows(images: int, counts: Mapping[str, int]) -> None:
    """Raises ValueError for rows that a product on a GPU cannot sum over, as the weight gradient does; by what they
    are, `counts` of an image.
    """
    for what, count in counts.items():
        if images * count % ROWS:
            raise ValueError(
                f"FP8 on a GPU: {images} images at once have {images * count} {what}, or a multiple of it, and the "
                f"weight gradient sums over multiples of {ROWS}: take another batch or, in training, "
                "fp8_grad_weight=false"
            )


def planned(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear that the plan names, with the module that has it and its name there.

    Raises ValueError for a name that is no linear of the model.
    """
    for name in plan.linears:
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(child)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"FP8 plan names {name!r}, which is no linear of this model")
        yield parent, child, linear
