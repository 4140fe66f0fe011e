"""The benchmarks of a GPU run on a CPU at small sizes, so that they are there when a GPU is."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention, gemm, train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Runs a benchmark -> the cells of its rows by the first, without the headings."""

    def run(module, *words: str) -> dict[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--out", str(tmp_path)])
        module.main()
        (written,) = tmp_path.iterdir()
        return rows(written)

    return run


def rows(page: Path) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_train_step(page):
    ways = ["BF16 eager", "FP8 native, an average in one pass with AdamW", "TransformerEngine delayed"]
    ways.append("diffusers PixArtTransformer2DModel, BF16")
    sizes = ["--batch", "2", "--blocks", "1", "--dim", "64", "--repeats", "1", "--matrix", "64"]
    found = page(train_step, *sizes, "--only", *ways)
    assert list(found) == ways
    assert (
        found.pop("TransformerEngine delayed")[0]
        == "fp8_backend=te: this machine has no GPU; use the native backend or torchao"
    )
    for images_a_second, *_, milliseconds, floor in found.values():
        assert float(images_a_second) > 0
        assert float(milliseconds) >= float(floor)


def test_gemm(page):
    found = page(gemm, "--batch", "1", "--dim", "32", "--repeats", "1")
    assert len(found) == 5 * 3  # linears, products of each
    assert all(float(cell) > 0 for cells in found.values() for cell in cells)


def test_attention(page):
    found = page(attention, "--batch", "1")
    assert {"torch's own choice", "flash, heads padded to 80", "math"} <= found.keys()
    assert all(float(cell) > 0 for cells in found.values() for cell in cells)
