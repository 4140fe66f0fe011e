"""GPU benchmarks run on a CPU at small sizes, so that they work once a GPU is available."""

import argparse
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
    """Callable that runs a benchmark and returns the cells of its table by first column, without headings."""

    def run(module, *words: str) -> dict[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--out", str(tmp_path)])
        module.main()
        (written,) = tmp_path.iterdir()
        return rows(written)

    return run


def rows(page: Path) -> dict[str, list[str]]:
    """Return the cells of the first table of a page by the first cell of each row."""
    table = page.read_text().partition("\n##")[0]  # profiles follow the table
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_train_step(page):
    variants = ["BF16 eager", "FP8 native, EMA fused with AdamW", "TransformerEngine delayed"]
    sizes = ["--batch", "2", "--blocks", "1", "--dim", "64", "--repeats", "1", "--matrix", "256"]
    table = page(train_step, *sizes, "--only", *variants)
    assert list(table) == variants
    assert table.pop("TransformerEngine delayed")[0].startswith("fp8_backend=te: this machine has no GPU")
    eager, compiled = (dict(zip(train_step.COLUMNS[1:], cells, strict=True)) for cells in table.values())
    assert float(eager["images/s"]) > 0
    assert eager["roofline, ms"] == eager["launches per block"] == ""  # nothing was compiled
    assert float(compiled["roofline, ms"]) > 0
    assert int(compiled["launches per block"]) > 20  # its GEMMs alone


def test_variant_out_of_memory_is_measured_at_a_smaller_batch(monkeypatch):
    tried: list[int] = []

    def run_subprocess(name, options, batch, kernels):
        tried.append(batch)
        if batch > 64:
            raise MemoryError
        return {}

    monkeypatch.setattr(train_step, "run_subprocess", run_subprocess)
    options = argparse.Namespace(batch=128)
    assert train_step.with_smaller_batches("BF16", options, [])["batch"] == 64
    assert tried == [128, 96, 64]
    tried.clear()
    options.batch = 16
    monkeypatch.setattr(train_step, "run_subprocess", lambda *_: exec("raise MemoryError"))
    with pytest.raises(MemoryError):
        train_step.with_smaller_batches("BF16", options, [])


def test_gemm(page):
    table = page(gemm, "--batch", "1", "--dim", "32", "--repeats", "1")
    assert len(table) == 5 * 3  # linears, GEMMs of each
    assert all(float(cell) > 0 for cells in table.values() for cell in cells)


def test_attention(page):
    table = page(attention, "--batch", "1")
    assert {"torch's default", "flash, heads padded to 80", "math"} <= table.keys()
    assert all(float(cell) > 0 for cells in table.values() for cell in cells)
