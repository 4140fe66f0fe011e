"""FP8 GEMMs: compiled, fused, with a high-precision weight gradient, each against the eager implementation."""

import shutil

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart.model.dit import DiT
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import E4M3, E5M2, GRAD_OUTPUT, INPUT, WEIGHT, Float8LinearFunction, quantize, scaled_matmul
from pixart.model.fp8.plan import Plan
from tests.support.fp8_models import fp8_model, inputs, sqnr

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")


def forward_backward(model: DiT, forward=None) -> dict[str, torch.Tensor]:
    """Return the output, gradients and scale state of one forward and backward pass."""
    x, t, text, mask = inputs()
    if forward:
        model.dit_blocks[0].forward = forward(model.dit_blocks[0].forward)
    output = model(x, t, text=text, text_mask=mask)
    output.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), **grads, **scaling.scale_state(model)}


def assert_close(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], tolerance: float) -> None:
    """Assert that the error of each tensor is within `tolerance`, relative to its norm."""
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert (tensor - actual[name]).norm() <= tolerance * tensor.norm() + 1e-12, name


@pytest.mark.slow
def test_a_block_compiles_without_graph_breaks():
    compiled = forward_backward(
        fp8_model(1), lambda forward: torch.compile(forward, fullgraph=True, backend="aot_eager")
    )
    assert_close(forward_backward(fp8_model(1)), compiled, 1e-5)
    assert compiled["dit_blocks.0.mlp.linear1.amax_history"][0].all()  # amax of all three tensors is staged


def test_compiled_gradients_of_a_single_linear_equal_eager_ones():
    """In float32, where the result needs no cast: a cast to the same dtype loses the gradient in torch 2.11."""

    def gradients(wrap) -> list[torch.Tensor]:
        torch.manual_seed(0)
        linear = fp8.Float8Linear.from_linear(nn.Linear(32, 16), Plan(linears=(), history=4))
        x = torch.randn(8, 32, requires_grad=True)
        wrap(linear.forward)(x).square().sum().backward()
        return [x.grad, linear.weight.grad, linear.bias.grad]

    eager = gradients(lambda forward: forward)
    compiled = gradients(lambda forward: torch.compile(forward, fullgraph=True, backend="aot_eager"))
    for name, expected, actual in zip(("x", "weight", "bias"), eager, compiled, strict=True):
        assert expected.norm() > 0, name
        torch.testing.assert_close(actual, expected, msg=name)


@needs_compiler
@pytest.mark.slow
def test_casts_and_amax_are_fused_into_the_producing_kernel():
    """The norm and modulation before a linear, and the activation and its gradient between two linears."""
    model = fp8_model(1)
    mlp = model.dit_blocks[0].mlp
    dim = mlp.linear1.in_features
    x, gamma, beta, alpha = torch.randn(2, 16, dim), torch.randn(2, dim), torch.randn(2, dim), torch.randn(2, dim)
    x.requires_grad_()
    compiled = torch.compile(mlp.forward, fullgraph=True)

    def run() -> None:
        compiled(x, gamma, beta, alpha).sum().backward()

    _, (forward, backward) = run_and_get_code(run)
    kernels = [part for part in forward.split("async_compile.cpp")[1:] if "rsqrt" in part]
    assert len(kernels) == 1  # one kernel computes the norm
    assert "2139095040" in kernels[0]  # 0x7F80_0000: the same kernel rounds to FP8
    for code, gemms in ((forward, 2), (backward, 4)):
        assert code.count("extern_kernels.mm(") + code.count("extern_kernels.addmm(") == gemms


def test_fused_projections_share_the_smallest_scales():
    """Where their scales differ, the result is that of separate linears with these scales."""
    separate, fused = fp8_model(1), fp8_model(1)
    factors = {
        f"dit_blocks.0.attention.attention.{name}_proj": factor for name, factor in zip("qkv", (3, 4, 5), strict=True)
    }
    for model in (separate, fused):
        for name, linear in fp8.float8_linears(model):
            factor = factors.get(name, 3) if model is fused else 3
            linear.scale[INPUT], linear.scale[WEIGHT], linear.scale[GRAD_OUTPUT] = 50.0, 100.0 * factor, 1e5 * factor
    fused.fuse_projections()
    one, other = forward_backward(separate), forward_backward(fused)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"dit_blocks.0.attention.attention.{name}.weight"
        assert sqnr(one[key], other[key]) > 60
    key = "dit_blocks.0.attention.attention.k_proj.amax_history"
    assert torch.allclose(one[key][0], other[key][0], rtol=1e-4)
    assert sqnr(one["output"], other["output"]) > 60
    unquantized = DiT(**separate.config)
    unquantized.load_state_dict(separate.state_dict())
    reference = forward_backward(unquantized)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"dit_blocks.0.attention.attention.{name}.weight"
        assert sqnr(reference[key], other[key]) > sqnr(reference[key], one[key]) - 0.5


def test_fused_projections_equal_separate_ones_without_fp8():
    separate, fused = fp8_model(1, linears=()), fp8_model(1, linears=())
    fused.fuse_projections()
    assert_close(forward_backward(separate), forward_backward(fused), 1e-5)


def test_projections_are_separate_if_one_has_fallen_back_to_bf16():
    model = fp8_model(1)
    model.fuse_projections()
    k_proj = model.dit_blocks[0].attention.attention.k_proj
    k_proj.fp8_enabled = False
    forward_backward(model)
    assert not k_proj.amax_history.any()
    assert model.dit_blocks[0].attention.attention.v_proj.amax_history[0].all()


def test_high_precision_weight_gradient_is_not_quantized():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 48))
    fp8.swap_linears(network, Plan(linears=("0",)), high_precision_grad_weight=True)
    network[0].scale[:] = torch.tensor([100.0, 2000.0, 1e4])
    x, grad = torch.randn(64, 32, requires_grad=True), torch.randn(64, 48)
    network(x).backward(grad)
    assert torch.allclose(network[0].weight.grad, grad.t() @ x.detach(), rtol=1e-5, atol=1e-5)
    grad8 = quantize(grad, network[0].scale[GRAD_OUTPUT], E5M2) / network[0].scale[GRAD_OUTPUT]
    weight8 = quantize(network[0].weight.detach(), network[0].scale[WEIGHT], E4M3) / network[0].scale[WEIGHT]
    assert torch.allclose(x.grad, grad8 @ weight8, rtol=1e-4, atol=1e-5)


def test_a_weight_gathered_in_fp8_gives_the_same_result():
    scales = torch.tensor([[10.0, 20.0, 30.0]])
    x, weight = torch.randn(8, 32), torch.randn(16, 32)
    weight8 = quantize(weight, scales[0, WEIGHT], E4M3).to(E4M3.dtype)
    proxy = torch.zeros(()).expand(16, 32)
    (actual,) = Float8LinearFunction.apply(x, proxy, weight8, None, scales, (16,), False, torch.zeros(3))
    (expected,) = Float8LinearFunction.apply(x, weight, None, None, scales, (16,), False, torch.zeros(3))
    assert torch.equal(actual, expected)


def test_bias_is_cast_to_the_result_dtype_on_a_gpu():
    """Under autocast a bias is float32 and the result BF16, which cuBLAS rejects. Uses fake CUDA tensors."""
    with FakeTensorMode(), torch.device("cuda"):
        a, b = torch.empty(32, 48).to(torch.float8_e4m3fn), torch.empty(48, 64).to(torch.float8_e4m3fn)
        inverse = torch.empty(())
        result = scaled_matmul(a, b, inverse, inverse, torch.bfloat16, bias=torch.empty(64), fast_accum=True)
    assert result.dtype == torch.bfloat16
    assert result.shape == (32, 64)
