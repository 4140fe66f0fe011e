"""Attention kernels give the same results, and autotuning selects the fastest one."""

import shutil

import pytest
import torch

from pixart.model import sdpa, sdpa_autotune
from pixart.model.dit import DiT
from pixart.model.sdpa import BACKENDS, AttentionKernel, attend
from pixart.model.sdpa_autotune import (
    PADDED_HEAD_DIMS,
    make_inputs,
    make_padding_mask,
    select_fastest,
    time_kernels,
)
from tests.support.fp8_models import inputs

CPU = torch.device("cpu")
DEFAULT, FLASH = AttentionKernel(), AttentionKernel(backend="flash")
CUDNN = AttentionKernel(backend="cuDNN", padded_head_dim=80)


def naive_attention(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("padded_head_dim", PADDED_HEAD_DIMS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_attention_against_its_formula(backend, padded_head_dim):
    q, k, v = (
        tensor.detach().float() for tensor in make_inputs(2, heads=3, head_dim=72, tokens=10, keys=24, device=CPU)
    )
    mask = make_padding_mask(2, 24, CPU)
    actual = attend(q, k, v, mask, AttentionKernel(backend=backend, padded_head_dim=padded_head_dim))
    assert actual.shape == q.shape
    torch.testing.assert_close(actual, naive_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_supported_kernels_are_timed():
    """The default kernel of torch comes first, then the backends that a CPU supports."""
    seconds = time_kernels(2, heads=2, head_dim=72, tokens=16, keys=8, device=CPU, masked=True)
    assert next(iter(seconds)) == DEFAULT
    assert {kernel.backend for kernel in seconds} == {None, "flash", "math"}
    assert {kernel.padded_head_dim for kernel in seconds} == set(PADDED_HEAD_DIMS)
    assert all(value > 0 for value in seconds.values())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_compiled_code_is_timed(monkeypatch):
    compiled: list[object] = []
    monkeypatch.setattr(sdpa_autotune, "BACKENDS", {"math": BACKENDS["math"]})
    monkeypatch.setattr(sdpa_autotune, "PADDED_HEAD_DIMS", (0,))
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(args) or original(*args, **kwargs))
    seconds = time_kernels(2, heads=2, head_dim=72, tokens=16, keys=8, device=CPU, masked=True, compiled=True)
    assert seconds.keys() == {DEFAULT, AttentionKernel(backend="math")}
    assert all(value > 0 for value in seconds.values())
    assert len(compiled) == len(seconds)


def test_a_kernel_with_wrong_results_is_excluded(monkeypatch):
    def wrong(q, k, v, mask, padded_head_dim):
        return original(q, k, v, mask, padded_head_dim) * (1.1 if padded_head_dim == 80 else 1)

    original = sdpa.padded_attention
    monkeypatch.setattr(sdpa_autotune, "padded_attention", wrong)
    seconds = time_kernels(2, heads=2, head_dim=72, tokens=16, keys=8, device=CPU, masked=False)
    assert {kernel.padded_head_dim for kernel in seconds} == {0, 96}


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({DEFAULT: 1.0, FLASH: 0.97}, DEFAULT),
        ({DEFAULT: 1.0, FLASH: 0.9, CUDNN: 0.8}, CUDNN),
        ({DEFAULT: 1.0}, DEFAULT),
    ],
)
def test_default_is_kept_unless_another_kernel_is_clearly_faster(seconds, best):
    assert select_fastest(seconds) == best


def test_a_model_with_selected_kernels_compiles_and_gives_the_same_result():
    torch.manual_seed(0)
    model = DiT(dim=144, cond_dim=16, num_heads=2, num_blocks=1, base_image_size=8, text_dim=32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, text, mask = inputs()
    expected = model(x, t, text=text, text_mask=mask)
    sdpa_autotune.set_kernels(model, CUDNN, AttentionKernel(backend="math", padded_head_dim=96))
    block = model.dit_blocks[0]
    assert block.attention.attention.kernel == CUDNN
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x, t, text=text, text_mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_autotuned_kernels_of_a_gpu():
    self_attention, cross_attention = sdpa_autotune.autotune(
        64, heads=16, head_dim=72, tokens=256, text_tokens=120, device=torch.device("cuda")
    )
    text_mask = make_padding_mask(64, 120, torch.device("cuda"))
    for kernel, keys, mask in ((self_attention, 256, None), (cross_attention, 120, text_mask)):
        inputs = make_inputs(64, 16, 72, 256, keys, torch.device("cuda"))
        assert sdpa_autotune.is_close(attend(*inputs, mask, kernel), attend(*inputs, mask, DEFAULT))
