"""The FP8 plan: which linears run in FP8, and with which recipe."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

# Linears of the same input, whose GEMM is one in training, by the name of their attention module.
FUSED_LINEARS = {"attention": ("q_proj", "k_proj", "v_proj"), "cross_attention": ("k_proj", "v_proj")}
GEMM_ALIGNMENT = 16  # dimensions of an FP8 GEMM must be multiples of this (cuBLAS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which linears run in FP8, and how their scales follow the data. Stored in a checkpoint's metadata."""

    linears: tuple[str, ...]  # module names
    kept: Mapping[str, str] = field(default_factory=dict)  # module name -> reason why it stays in BF16
    recipe: str = "delayed"
    history: int = 16  # rows of the amax history, including the staging row
    margin: int = 0  # powers of two of headroom
    batch: int = 1  # images per step and rank; the gradients of a mean loss are inversely proportional to it


def fused_linears(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of linears, among those of `names`, that one GEMM computes: their scales are shared.

    A group of which a linear is missing, such as one that has fallen back to BF16, is not fused.
    """
    attentions: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parent, _, child = name.rpartition(".")
        if child in FUSED_LINEARS.get(parent.rpartition(".")[2], ()):
            attentions[parent].append(name)
    return [
        group for parent, group in attentions.items() if len(group) == len(FUSED_LINEARS[parent.rpartition(".")[2]])
    ]


def check_gemm_alignment(images: int, rows_per_image: Mapping[str, int]) -> None:
    """Check that FP8 GEMMs on a GPU can compute weight gradients, which sum over the rows of a linear's input.

    `rows_per_image` is the number of rows of an image by kind of row, "image tokens" for example.
    Raises ValueError if `images` of them are not a multiple of GEMM_ALIGNMENT.
    """
    for name, rows in rows_per_image.items():
        if images * rows % GEMM_ALIGNMENT:
            raise ValueError(
                f"FP8 on a GPU: {images} images have {images * rows} {name}, and the weight gradient sums over these; "
                f"their number must be a multiple of {GEMM_ALIGNMENT}: change the batch size or, in training, set "
                "fp8_grad_weight=false"
            )


def iterate_planned_linears(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Iterate over the linears that the plan names: parent module, name in the parent, linear.

    Raises ValueError for a name that is not a linear of the model.
    """
    for name in plan.linears:
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(child)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"FP8 plan: {name!r} is not a linear of this model; convert the checkpoint again")
        yield parent, child, linear
