"""The next step of training, from a checkpoint of the original JAX training and from its conversion."""

import numpy as np
import pytest
import torch
from torch import Tensor

from conversion.reading import equinox, formats, orbax
from pixart.checkpoint.directory import Checkpoint
from pixart.config.training import TrainConfig
from pixart.model.dit import load_model, parameter_groups
from pixart.training.optimizer import make_optimizer, optimizer_tensors
from tests.support import equinox_model
from tests.support.equinox_model import BUFFERS, COUNT, MU, NU, SIZES, Arrays, read, tensors

LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.03, (0.9, 0.999), 1e-15  # as in the original training
pytestmark = pytest.mark.usefixtures("without_jax")


def adamw(weight: np.ndarray, grad: np.ndarray, mu: np.ndarray, nu: np.ndarray, step: int, decay: float) -> np.ndarray:
    """Return a weight after one step of optax.adamw, in float64."""
    weight, grad, mu, nu = (np.asarray(value, np.float64) for value in (weight, grad, mu, nu))
    mu = (BETAS[0] * mu + (1 - BETAS[0]) * grad) / (1 - BETAS[0] ** step)
    nu = (BETAS[1] * nu + (1 - BETAS[1]) * grad**2) / (1 - BETAS[1] ** step)
    return weight - LR * (mu / (np.sqrt(nu) + EPS) + decay * weight)


def check_next_step(checkpoint: Checkpoint, state: Arrays, loss_inputs: tuple[Tensor, Tensor, Tensor], **sizes: int):
    """Compare a step of this suite's optimizer with one of the JAX training.

    AdamW's step does not depend on the scale of a parameter: where this suite's is larger, its step is not. The JAX
    training also decays biases and norms, this suite does not, so that they are compared without decay.
    """
    x, t, label = loss_inputs
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    model = load_model(checkpoint.config, {name: tensor.clone() for name, tensor in checkpoint.model.items()})
    config = {"lr": LR, "weight_decay": WEIGHT_DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    optimizer = make_optimizer(model, TrainConfig(steps=99, global_batch_size=4, warmup_steps=0, **config))
    for name, tensor in optimizer_tensors(optimizer, model).items():
        tensor.copy_(checkpoint.optimizer[name])
    (model(x, t, label) - target).square().mean().backward()
    optimizer.step()

    leaves = tensors({name[2:]: value for name, value in state.items() if name.startswith("0.")})
    trained = {name: tensor.requires_grad_() for name, tensor in leaves.items() if name not in BUFFERS}
    loss = (equinox_model.velocity(leaves, x, t, label, **sizes) - target).square().mean() / 2
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    decayed = set(parameter_groups(model)[0])
    compared = 0
    for name, leaf in trained.items():
        if equinox.is_dropped(name):
            assert float(grads[name].abs().max()) < 1e-6  # softmax does not see it
            continue
        before, moments = leaf.detach().numpy(), (state[f"{MU}.{name}"], state[f"{NU}.{name}"])
        decay = WEIGHT_DECAY if name in decayed else 0.0
        after = adamw(before, grads[name].numpy(), *moments, int(state[COUNT]) + 1, decay)
        change = equinox.reorder(name, torch.from_numpy(after - before), checkpoint.config).float()
        expected = checkpoint.model[name] + change
        assert torch.allclose(model.get_parameter(name), expected, rtol=1e-6, atol=LR * 1e-3), name
        assert float(change.abs().max()) > LR / 10, name
        compared += 1
    assert compared == len(list(model.parameters()))


def test_next_step_equals_that_of_the_jax_training(step, parameters):
    x = torch.randn(4, SIZES["channels"], 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (x, torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 4]))
    check_next_step(read(step), equinox_model.training_state(parameters), inputs)


def test_next_step_of_the_original_training(shared_data):
    folder = shared_data / "jax/stage1/3"
    expected = tensors(dict(np.load(shared_data / "jax/expected.npz")))
    item = orbax.read_items(folder)[0]
    state = {name: np.array(array.read().result()) for name, array in orbax.open_arrays(item).items()}
    inputs = (expected["x"], expected["t"], expected["lab"].long())
    check_next_step(formats.read(folder), state, inputs, heads=4, base_latent_size=32)
