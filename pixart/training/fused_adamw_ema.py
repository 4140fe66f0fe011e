"""AdamW and EMA fused in one compiled pass over memory, block by block.

torch's fused AdamW followed by the EMA moves 40 bytes per weight; the fused pass moves 36, as the new weight is not
read again. All blocks have the same shapes, so two compiled graphs suffice for a model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixart.model.dit import DiT
from pixart.training.optimizer import MOMENTS, adamw_ema_update


class FusedAdamWEma:
    """Replacement of `optimizer.step()` and `EMA.update` that works on their tensors."""

    def __init__(self, model: DiT, optimizer: torch.optim.AdamW, ema_weights: Mapping[str, Tensor]) -> None:
        self.optimizer, self.ema_weights = optimizer, ema_weights
        groups = optimizer.param_groups
        self.weight_decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
        blocks = [list(block.parameters()) for block in model.blocks]
        in_blocks = {parameter for block in blocks for parameter in block}
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.parts = [*blocks, [parameter for parameter in self.names if parameter not in in_blocks]]
        self.update = torch.compile(adamw_ema_update, fullgraph=True, dynamic=False, options={"combo_kernels": True})

    @torch.no_grad()
    def step(self, lr: float, ema_weight: float, skip: Tensor) -> None:
        """Update the weights and then the EMA, whose new values take `ema_weight` of the weights.

        Where `skip` () is true, weights and moments do not change.
        """
        group = self.optimizer.param_groups[0]
        # A copy of a number to the device would synchronize.
        new_lr, new_weight = (torch.full((), value, device=skip.device) for value in (lr, ema_weight))
        for part in self.parts:
            with_grad = [parameter for parameter in part if parameter.grad is not None]
            tensors = [[local_tensor(tensor) for tensor in self.tensors(parameter)] for parameter in with_grad]
            weight_decays = [self.weight_decays[parameter] for parameter in with_grad]
            beta1, beta2 = group["betas"]
            self.update(tensors, weight_decays, new_lr, new_weight, skip, beta1, beta2, group["eps"])
            for parameter in part:
                if parameter.grad is None:
                    self.ema_weights[self.names[parameter]].lerp_(parameter, ema_weight)

    def tensors(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the `optimizer.PARAMETER_TENSORS` of a parameter."""
        state = self.optimizer.state[parameter]
        moments = [state[name] for name in MOMENTS]
        return [parameter, parameter.grad, *moments, state["step"], self.ema_weights[self.names[parameter]]]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
