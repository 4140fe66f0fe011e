"""The page that compares training runs."""

import re

from jobs.reports.comparison import ComparedRun, differences, page


def compared(name: str, losses: list[float], **settings: object) -> ComparedRun:
    curves = {"train/loss": list(enumerate(losses)), f"train/only_{name}": [(0, 1.0)]}
    return ComparedRun(name=name, results={"steps": f"{len(losses)}"}, settings=settings, curves=curves)


def test_settings_that_differ():
    runs = [compared("a", [1.0], lr=0.1, dim=8), compared("b", [1.0], lr=0.2, dim=8, fp8=True)]
    assert differences(runs) == [{"lr": 0.1}, {"lr": 0.2, "fp8": True}]
    assert differences(runs[:1] * 2) == [{}, {}]


def test_one_curve_per_run():
    runs = [compared("first <b>", [2.0, 1.5, 1.0]), compared("other", [3.0, 2.0])]
    drawn = page(runs)
    assert "first &lt;b&gt;" in drawn
    assert "<b>" not in drawn
    (chart,) = re.findall(r"<h2>train/loss</h2>.*?</figure>", drawn, re.DOTALL)
    assert len(re.findall('<g class="series"', chart)) == 2
    assert "<p>None.</p>" in drawn  # no setting differs
    assert "No step has been logged yet" in page([compared("a", []), compared("b", [])])
