"""Attention by any kernel is the same attention, and the fastest one is taken."""

import shutil

import pytest
import torch

from pixart.model import sdpa, sdpa_autotune
from pixart.model.dit import DiT
from pixart.model.sdpa import BACKENDS, Kernel, attend
from pixart.model.sdpa_autotune import PADDINGS, fastest, operands, padding_mask, timings
from tests.support.fp8_models import inputs

CPU = torch.device("cpu")
OWN, CUDNN, FLASH = Kernel(), Kernel(backend="cuDNN", width=80), Kernel(backend="flash")


def naive(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_attention_against_its_formula(backend, padded):
    q, k, v = (part.detach().float() for part in operands(2, heads=3, width=72, tokens=10, keys=24, device=CPU))
    mask = padding_mask(2, 24, CPU)
    found = attend(q, k, v, mask, Kernel(backend=backend, width=padded))
    assert found.shape == q.shape
    torch.testing.assert_close(found, naive(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_what_is_measured():
    """Torch's own choice first, and the rest as far as this machine has them."""
    found = timings(2, heads=2, width=72, tokens=16, keys=8, device=CPU, masked=True)
    assert next(iter(found)) == OWN
    assert {kernel.backend for kernel in found} == {None, "flash", "math"}
    assert {kernel.width for kernel in found} == set(PADDINGS)
    assert all(taken > 0 for taken in found.values())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_compiled_code_is_what_is_timed(monkeypatch):
    compiled: list[object] = []
    monkeypatch.setattr(sdpa_autotune, "BACKENDS", {"math": BACKENDS["math"]})
    monkeypatch.setattr(sdpa_autotune, "PADDINGS", (0,))
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **how: compiled.append(given) or real(*given, **how))
    found = timings(2, heads=2, width=72, tokens=16, keys=8, device=CPU, masked=True, compiled=True)
    assert found.keys() == {OWN, Kernel(backend="math")}
    assert all(taken > 0 for taken in found.values())
    assert len(compiled) == len(found)


def test_a_kernel_that_comes_to_something_else_is_left_out(monkeypatch):
    def wrong(q, k, v, mask, to):
        return right(q, k, v, mask, to) * (1.1 if to == 80 else 1)

    right = sdpa.padded
    monkeypatch.setattr(sdpa_autotune, "padded", wrong)
    found = timings(2, heads=2, width=72, tokens=16, keys=8, device=CPU, masked=False)
    assert {kernel.width for kernel in found} == {0, 96}


@pytest.mark.parametrize(
    ("found", "best"),
    [({OWN: 1.0, FLASH: 0.97}, OWN), ({OWN: 1.0, FLASH: 0.9, CUDNN: 0.8}, CUDNN), ({OWN: 1.0}, OWN)],
)
def test_torch_chooses_unless_another_is_clearly_faster(found, best):
    assert fastest(found) == best


def test_a_model_with_other_kernels_compiles_in_one_piece_and_says_the_same():
    torch.manual_seed(0)
    model = DiT(dim=144, cond_dim=16, num_heads=2, num_blocks=1, base_image_size=8, text_dim=32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, text, mask = inputs()
    expected = model(x, t, text=text, text_mask=mask)
    sdpa_autotune.use(model, CUDNN, Kernel(backend="math", width=96))
    block = model.dit_blocks[0]
    assert block.attention.attention.kernel == CUDNN
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x, t, text=text, text_mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fastest_kernels_of_a_gpu():
    image, text = sdpa_autotune.measured(64, heads=16, width=72, tokens=256, text=120, device=torch.device("cuda"))
    for kernel, keys, mask in ((image, 256, None), (text, 120, padding_mask(64, 120, torch.device("cuda")))):
        given = operands(64, 16, 72, 256, keys, torch.device("cuda"))
        assert sdpa_autotune.agree(attend(*given, mask, kernel), attend(*given, mask, OWN))
