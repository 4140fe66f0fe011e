"""AdamW and the average of the weights in one compiled pass over memory, block by block.

AdamW's fused kernel and the average after it move 40 bytes of each weight; together they move 36, as the new weight
need not be read again. Blocks are alike, so that two graphs serve a model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixart.training.optimizer import MOMENTS, advance


class OnePass:
    """In place of `optimizer.step()` and `ema.update`, on their own tensors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW, averages: Mapping[str, Tensor]) -> None:
        self.optimizer, self.averages = optimizer, averages
        groups = optimizer.param_groups
        self.decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
        blocks = [list(block.parameters()) for block in model.dit_blocks]
        in_blocks = {parameter for block in blocks for parameter in block}
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.parts = [*blocks, [parameter for parameter in self.names if parameter not in in_blocks]]
        self.advance = torch.compile(advance, fullgraph=True, dynamic=False, options={"combo_kernels": True})

    @torch.no_grad()
    def step(self, rate: float, share: float, skip: Tensor) -> None:
        """`rate` of learning; the average takes `share` of the new weights; `skip` (): the weights stay as they are."""
        group = self.optimizer.param_groups[0]
        numbers = [torch.full((), value, device=skip.device) for value in (rate, share)]  # a copy would wait
        for part in self.parts:
            seen = [parameter for parameter in part if parameter.grad is not None]
            rows = [[local(tensor) for tensor in self.tensors(parameter)] for parameter in seen]
            decays = [self.decays[parameter] for parameter in seen]
            self.advance(rows, decays, *numbers, skip, *group["betas"], group["eps"])
            for parameter in (own for own in part if own.grad is None):  # no gradient reaches it
                self.averages[self.names[parameter]].lerp_(parameter, share)

    def tensors(self, parameter: nn.Parameter) -> list[Tensor]:
        """As `optimizer.COLUMNS` has them."""
        state = self.optimizer.state[parameter]
        moments = [state[name] for name in MOMENTS]
        return [parameter, parameter.grad, *moments, state["step"], self.averages[self.names[parameter]]]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
