"""Tensors by name, loaded or computed on access."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

State = Mapping[str, Tensor]


class LazyTensors(Mapping[str, Tensor]):
    """Mapping whose tensors are produced by a function at each access and not cached.

    `shapes` optionally has a tensor on the meta device by name, for checks that need no values.
    """

    def __init__(
        self, factories: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, Tensor] | None = None
    ) -> None:
        self.factories, self.shapes = factories, shapes or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.factories[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.factories)

    def __len__(self) -> int:
        return len(self.factories)
