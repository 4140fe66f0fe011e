"""FP8 products in a compiled graph, side by side, and with a fine weight gradient, against the plain ones."""

import shutil

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart.model.dit import DiT
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import E4M3, E5M2, GRAD_OUTPUT, INPUT, WEIGHT, Float8Product, quantize, scaled_matmul
from pixart.model.fp8.plan import Plan
from tests.support.fp8_models import fp8_model, inputs, sqnr

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")


def step(model: DiT, forward=None) -> dict[str, torch.Tensor]:
    """Output, gradients and amax of one pass there and back."""
    x, t, text, mask = inputs()
    if forward:
        model.dit_blocks[0].forward = forward(model.dit_blocks[0].forward)
    output = model(x, t, text=text, text_mask=mask)
    output.square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), **found, **scaling.scale_state(model)}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], most: float) -> None:
    """Within a share of each tensor's norm."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= most * tensor.norm() + 1e-12, name


@pytest.mark.slow
def test_a_block_compiles_without_a_break():
    whole = step(fp8_model(1), lambda forward: torch.compile(forward, fullgraph=True, backend="aot_eager"))
    assert_close(step(fp8_model(1)), whole, 1e-5)
    assert whole["dit_blocks.0.mlp.linear1.amax_history"][0].all()  # of all three tensors


def test_compiled_gradients_of_a_single_product_equal_eager_ones():
    """In float32, where the result needs no cast: a cast that changes nothing has no gradient in torch 2.11."""

    def gradients(wrap) -> list[torch.Tensor]:
        torch.manual_seed(0)
        linear = fp8.Float8Linear.from_linear(nn.Linear(32, 16), Plan(linears=(), history=4))
        x = torch.randn(8, 32, requires_grad=True)
        wrap(linear.forward)(x).square().sum().backward()
        return [x.grad, linear.weight.grad, linear.bias.grad]

    eager = gradients(lambda forward: forward)
    compiled = gradients(lambda forward: torch.compile(forward, fullgraph=True, backend="aot_eager"))
    for name, one, other in zip(("x", "weight", "bias"), eager, compiled, strict=True):
        assert one.norm() > 0, name
        torch.testing.assert_close(other, one, msg=name)


@needs_compiler
@pytest.mark.slow
def test_casts_and_amax_are_part_of_the_kernel_that_makes_their_tensor():
    """Of the norm and modulation before a linear, and of the activation and its gradient between two."""
    model = fp8_model(1)
    mlp = model.dit_blocks[0].mlp
    dim = mlp.linear1.in_features
    x, gamma, beta, alpha = torch.randn(2, 16, dim), torch.randn(2, dim), torch.randn(2, dim), torch.randn(2, dim)
    x.requires_grad_()
    compiled = torch.compile(mlp.forward, fullgraph=True)

    def there_and_back() -> None:
        compiled(x, gamma, beta, alpha).sum().backward()

    _, (forward, backward) = run_and_get_code(there_and_back)
    kernels = [part for part in forward.split("async_compile.cpp")[1:] if "rsqrt" in part]
    assert len(kernels) == 1  # one pass makes the norm
    assert "2139095040" in kernels[0]  # 0x7F80_0000: and its values in FP8
    for code, products in ((forward, 2), (backward, 4)):
        assert code.count("extern_kernels.mm(") + code.count("extern_kernels.addmm(") == products


def test_projections_side_by_side_are_those_one_by_one():
    """Where their scales differ too: the gradient's are brought together, which E5M2's range allows."""
    apart, together = fp8_model(1), fp8_model(1)
    for model in (apart, together):
        for index, (_, linear) in enumerate(fp8.float8_linears(model)):
            linear.scale[INPUT], linear.scale[WEIGHT], linear.scale[GRAD_OUTPUT] = (
                50.0,
                300.0 + 40 * index,
                1e5 * 1.7**index,
            )
    together.fuse_projections()
    one, other = step(apart), step(together)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"dit_blocks.0.attention.attention.{name}.weight"
        assert sqnr(one[key], other[key]) > 15  # both round the same gradient to two bits
    key = "dit_blocks.0.attention.attention.k_proj.amax_history"
    assert torch.allclose(one[key][0], other[key][0], rtol=1e-4)
    assert sqnr(one["output"], other["output"]) > 60
    exact = DiT(**apart.config)
    exact.load_state_dict(apart.state_dict())
    reference = step(exact)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"dit_blocks.0.attention.attention.{name}.weight"
        assert sqnr(reference[key], other[key]) > sqnr(reference[key], one[key]) - 0.5


def test_projections_side_by_side_without_fp8_are_those_one_by_one():
    apart, together = fp8_model(1, linears=()), fp8_model(1, linears=())
    together.fuse_projections()
    assert_close(step(apart), step(together), 1e-5)


def test_of_two_projections_one_of_which_left_fp8_each_goes_alone():
    model = fp8_model(1)
    model.fuse_projections()
    fallen = model.dit_blocks[0].attention.attention.k_proj
    fallen.in_fp8 = False
    step(model)
    assert not fallen.amax_history.any()
    assert model.dit_blocks[0].attention.attention.v_proj.amax_history[0].all()


def test_a_fine_weight_gradient_is_no_fp8_product():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 48))
    fp8.swap_linears(network, Plan(linears=("0",)), fine_weight_gradient=True)
    network[0].scale[:] = torch.tensor([100.0, 2000.0, 1e4])
    x, grad = torch.randn(64, 32, requires_grad=True), torch.randn(64, 48)
    network(x).backward(grad)
    assert torch.allclose(network[0].weight.grad, grad.t() @ x.detach(), rtol=1e-5, atol=1e-5)
    grad8 = quantize(grad, network[0].scale[GRAD_OUTPUT], E5M2) / network[0].scale[GRAD_OUTPUT]
    weight8 = quantize(network[0].weight.detach(), network[0].scale[WEIGHT], E4M3) / network[0].scale[WEIGHT]
    assert torch.allclose(x.grad, grad8 @ weight8, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_there_in_fp8_is_taken_as_it_is():
    scales = torch.tensor([[10.0, 20.0, 30.0]])
    x, weight = torch.randn(8, 32), torch.randn(16, 32)
    weight8 = quantize(weight, scales[0, WEIGHT], E4M3).to(E4M3.dtype)
    nothing = torch.zeros(()).expand(16, 32)
    given = Float8Product.apply(x, nothing, weight8, None, scales, (16,), False, torch.zeros(3))
    assert torch.equal(given, Float8Product.apply(x, weight, None, None, scales, (16,), False, torch.zeros(3)))


@pytest.mark.parametrize("rows", [1, 32])
def test_a_bias_has_the_type_of_the_product_on_a_gpu(rows):
    """Under autocast it is float32 where the product is BF16; cuBLAS refuses that. On a GPU without memory."""
    with FakeTensorMode(), torch.device("cuda"):
        a, b = torch.empty(32, 48).to(torch.float8_e4m3fn), torch.empty(48, 64).to(torch.float8_e4m3fn)
        scales, bias = (torch.empty(rows, 1) if rows > 1 else torch.empty(()), torch.empty(())), torch.empty(64)
        product = scaled_matmul(a, b, *scales, torch.bfloat16, bias=bias, fast=True)
    assert product.dtype == torch.bfloat16
    assert product.shape == (32, 64)
