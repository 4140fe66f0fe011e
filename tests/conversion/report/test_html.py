import copy
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from conversion.report.html import page
from conversion.report.layer_names import fold_names
from pixart.html.charts import linear_axis

KINDS = ("attention.attention.q_proj", "cross_attention.q_proj", "mlp.linear1")
T = [0.05, 0.2, 0.5, 0.8, 0.95]
VOID = {"meta", "br", "img"}
HOSTILE = "<script>alert('x')</script>&\"</svg>"


class BalancedParser(HTMLParser):
    """Parser that fails on a misnested closing tag; `open` is empty at the end of a complete document."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> BalancedParser:
    parser = BalancedParser()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def plots(html: str) -> list[ElementTree.Element]:
    """Return the SVGs of figures, without those of the legends."""
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return [svg for svg in svgs if svg.get("role") == "img"]


def marks(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for path in svg.iter("path") if path.find("title") is not None]


def heights(series: ElementTree.Element) -> list[float]:
    return [float(mark.attrib["transform"].split()[1].rstrip(")")) for mark in marks(series)]


def layer(block: int, kind: str) -> dict[str, Any]:
    has_no_grad = kind == "cross_attention.q_proj"
    grad_weight = None if has_no_grad else 24.25 + block
    return {
        "name": f"dit_blocks.{block}.{kind}",
        "sampled_outputs": [32, 32],
        "amax": [7.125, 0.25, 0.0 if has_no_grad else 3e-5],
        "headroom_bits": [1.0, 1.25, None if has_no_grad else 0.75],
        "underflow_rate": [0.0625, 0.0, 0.0],
        "saturation_rate": [0.0, 0.0, 0.0],
        "sqnr_db": {"input": 31.5, "weight": 31.75, "output": 28.5, "grad_weight": grad_weight},
        "dynamic_sqnr_db": {"input": 31.5, "weight": 31.75, "output": 28.5, "grad_weight": grad_weight},
        "forward_only_sqnr_db": {"grad_weight": None if has_no_grad else 11.125},
    }


def make_report(blocks: int = 2) -> dict[str, Any]:
    return {
        "source": "/runs/one/step_400000.pt",
        "source_format": ".pt of the original training",
        "source_sha256": "0123456789abcdef" * 4,
        "config_inferred": True,
        "output": "/runs/one/step_400000.fp8",
        "stages": [1, 2],
        "skipped_extra_states": {},
        "unused_entries": {},
        "cond_dropout_prob": None,
        "decay_qk_norm": False,
        "step": 400000,
        "config": {"dim": 1152, "text_dim": 2048, "num_classes": None},
        "calibration_data": "/data/photos",
        "calibration_latents": [[32, 32]],
        "reparameterization": {
            "strategy": "fitted",
            "t": T,
            "output_error": {"paper": [0.3, 0.1, 0.0, 0.1, 0.3], "fitted": [0.02, 0.01, 0.03, 0.01, 0.02]},
            "mean_error": {"paper": 0.163, "fitted": 0.018},
            "sample_error": {"paper": 0.291, "fitted": 0.042},
        },
        "fp8_recipe": "delayed",
        "amax_statistic": "percentile",
        "margin": 3,
        "amax_history_len": 17,
        "num_batches": 9,
        "batch_size": 19,
        "layers": [layer(block, kind) for block in range(blocks) for kind in KINDS],
        "num_fp8_linears": blocks * len(KINDS),
        "kept_in_bf16": {
            "patchify": "latent entry projection",
            **{f"dit_blocks.{block}.adaLN1": "modulation" for block in range(blocks)},
        },
        "uncalibrated": [f"dit_blocks.{block}.cross_attention.q_proj.grad_output" for block in range(blocks)],
        "losses": {"stage 1, BF16": 0.8, "stage 2, BF16": 0.804, "stage 2, FP8": 0.806412},
        "gradient_cosine_similarity": 0.98765,
        "tensor_counts": {"carried": 41, "derived": 7, "new": 5},
        "tensor_provenance": {"patchify.weight": "carried", "cond_proj.weight": "derived"},
        "dropped_tensors": {"k_norm.bias, which softmax ignores": 28},
        "versions": {"torch": "2.13.1", "python": "3.12.9"},
        "acceptance": {
            "passed": True,
            "checks": [
                {"name": "BF16 loss vs. FP8 loss", "value": "+0.300%", "limit": "0.35%", "passed": True},
                {"name": "Carried tensors", "value": "0 of 106", "limit": "0", "passed": True},
            ],
        },
    }


def failed(report: dict[str, Any]) -> dict[str, Any]:
    report["acceptance"]["passed"] = report["acceptance"]["checks"][0]["passed"] = False
    return report


def without_stage1(report: dict[str, Any]) -> None:
    report.update(stages=[2, 2], reparameterization=None)


def from_transformer_engine(report: dict[str, Any]) -> None:
    report.update(skipped_extra_states={"model": 453}, cond_dropout_prob=0.0, decay_qk_norm=True)


def without_layers(report: dict[str, Any]) -> None:
    report.update(layers=[], num_fp8_linears=0, uncalibrated=[], kept_in_bf16={}, gradient_cosine_similarity=None)


def stateless(report: dict[str, Any]) -> None:
    report["fp8_recipe"] = "mxfp8"
    for layer in report["layers"]:
        del layer["forward_only_sqnr_db"]
        layer.update(headroom_bits=[None] * 3, underflow_rate=[None] * 3, saturation_rate=[None] * 3)


def without_values(report: dict[str, Any]) -> None:
    stateless(report)
    for layer in report["layers"]:
        layer.update({key: dict.fromkeys(layer[key]) for key in ("sqnr_db", "dynamic_sqnr_db")}, amax=[None] * 3)
    report.update(source_format=None)


def broken_numbers(report: dict[str, Any]) -> None:
    report["losses"]["stage 2, FP8"] = math.nan
    report["layers"][0].update(amax=[math.inf, 0.25, 3e-5], headroom_bits=[-math.inf, 1.0, math.nan])
    report["reparameterization"]["output_error"]["paper"] = [math.nan, math.inf, 0.0, 1e-30, 3.0]


def all_zero_errors(report: dict[str, Any]) -> None:
    report["reparameterization"]["output_error"] = {"paper": [0.0] * len(T), "fitted": [0.0] * len(T)}


CHANGES = (
    failed,
    without_stage1,
    from_transformer_engine,
    without_layers,
    stateless,
    without_values,
    broken_numbers,
    all_zero_errors,
)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_page_is_self_contained(change):
    report = make_report()
    if change:
        change(report)
    html = page(report)
    parsed = read(html)
    for element in (element for svg in plots(html) for element in svg.iter()):
        assert not re.search("nan|inf|None", "".join(element.attrib.values())), element.attrib
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"//|url\(|@import|\bsrc=|\bhref=", html)
    assert '<meta charset="utf-8">' in html
    assert "color-scheme: light dark" in html


def test_failure_is_shown_at_the_top():
    assert "FAIL" not in page(make_report())
    html = page(failed(make_report()))
    assert "<title>FAIL" in html
    top = html[html.index("<body>") : html.index("Source and settings")]
    assert "failed its acceptance checks" in top
    assert "BF16 loss vs. FP8 loss: +0.300%, limit 0.35%" in top
    assert top.count(">FAIL</span>") == 2
    assert top.count(">PASS</span>") == 1


def leaves(value: object) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, more in value.items() for leaf in [str(key), *leaves(more)]]
    if isinstance(value, list):
        return [leaf for more in value for leaf in leaves(more)]
    return (
        [] if value is None or isinstance(value, bool) else [f"{value:.3g}" if isinstance(value, float) else str(value)]
    )


def test_values_are_shown():
    report = make_report()
    shown = " ".join(read(page(report)).text)
    scalars = ("source", "source_format", "source_sha256", "output", "step", "calibration_data", "fp8_recipe")
    names = (*scalars, "amax_statistic", "num_fp8_linears", "losses", "tensor_counts", "tensor_provenance")
    for value in leaves([report[name] for name in (*names, "dropped_tensors", "versions")]):
        assert value in shown, value
    for value in leaves([report["reparameterization"][name] for name in ("mean_error", "sample_error")]):
        assert value in shown, value
    for value in leaves([[check["name"], check["value"], check["limit"]] for check in report["acceptance"]["checks"]]):
        assert value in shown, value
    for value in ("0.98765", "dim 1152", "inferred from shapes", "modulation", "dit_blocks.{0-1}.adaLN1", "patchify"):
        assert value in shown, value
    assert "9 batches of 19 images" in shown
    assert "margin 3 (powers of two), amax history of 17 rows" in shown
    assert "dit_blocks.{0-1}.cross_attention.q_proj.grad_output" in shown
    assert "num_classes" not in shown
    assert "+0.300%" in shown[shown.index("Losses") :]


def test_table_of_layers():
    html = page(make_report())
    row = next(row for row in re.findall("<tr>.*?</tr>", html) if "<td>dit_blocks.1.mlp.linear1</td>" in row)
    cells = re.findall("<td[^>]*>(.*?)</td>", row)
    assert cells[1:10] == ["7.12", "0.25", "3e-05", "1", "1.25", "0.75", "6.25", "0", "0"]
    assert cells[10:] == ["0", "0", "0", "31.5", "31.8", "28.5", "25.2", "25.2", "11.1"]
    head = re.findall(r'<th colspan="(\d+)">', html)
    assert sum(map(int, head)) == len(cells)


def test_saturation_is_marked():
    report = make_report()
    assert 'class="bad"' not in page(report)
    report["layers"][0].update(headroom_bits=[-0.5, 1.0, 1.0], saturation_rate=[0.0, 0.0, 0.125])
    assert re.findall('<b class="bad">(.*?)</b>', page(report)) == ["-0.5", "12.5"]


def test_sampling_of_outputs_is_noted():
    report = make_report()
    assert "sample of their outputs" not in page(report)
    report["layers"][0]["sampled_outputs"] = [16, 32]
    assert "sample of their outputs" in page(report)


def test_error_curves():
    report = make_report()
    curves = plots(page(report))[0].findall("g")
    assert [len(marks(curve)) for curve in curves] == [len(T)] * 2
    paper, fitted = map(heights, curves)
    assert paper[2] == max(paper + fitted) == 250, "an error of zero is drawn at the bottom"
    assert paper[0] < paper[1] < fitted[0]
    decade = fitted[1] - paper[1]  # 0.01 under 0.1
    assert fitted[0] == pytest.approx(fitted[1] - decade * math.log10(2), abs=0.11)
    report["reparameterization"]["output_error"]["paper"][0] = math.nan
    html = page(report)
    assert len(marks(plots(html)[0])) == 2 * len(T) - 1
    assert "1 missing or non-finite values are not drawn" in html


def test_conversion_keeps_the_stage_on_request():
    report = make_report()
    without_stage1(report)
    html = page(report)
    assert len(plots(html)) == 2
    assert "Re-parameterization" not in html
    assert "2, unchanged" in html


def test_plots_of_layers():
    sqnr, headroom = plots(page(make_report(28)))[1:]
    assert len(marks(sqnr)) == 28 * 2 * 3, "one kind of linear has no gradient"
    assert len(marks(headroom)) == 28 * (3 * 3 - 1)
    labels = [text.text for text in sqnr.iter("text")]
    for label in ("SQNR, dB", "q_proj", "linear1", "0", "27"):
        assert label in labels, label
    colors = {group.attrib["style"] for group in sqnr.findall("g")}
    assert len(colors) == len(KINDS)


def test_recipe_without_stored_scales():
    report = make_report()
    stateless(report)
    html = page(report)
    assert len(plots(html)) == 2
    assert "No values to plot" in html
    assert "orward only leaves" not in html
    assert "calibrated</li>" not in html
    assert "mxfp8</li>" in html


def test_worst_layer_is_named():
    report = make_report()
    report["layers"][3]["dynamic_sqnr_db"]["grad_weight"] += 0.75
    assert f"0.750 dB, in {report['layers'][3]['name']}" in page(report)


def test_warning_for_synthetic_data():
    report = make_report()
    assert "calibrated on synthetic data" not in page(report)
    report["calibration_data"] = "synthetic: unit-variance latents and text"
    assert "calibrated on synthetic data" in page(report)


def hostile(value: Any) -> Any:
    """Append markup to every string."""
    if isinstance(value, dict):
        return {key: hostile(more) for key, more in value.items()}
    if isinstance(value, list):
        return [hostile(more) for more in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_names_are_escaped():
    report = failed(make_report())
    plain = read(page(report))
    bad = hostile(copy.deepcopy(report))
    for name in (
        "config",
        "kept_in_bf16",
        "losses",
        "tensor_provenance",
        "tensor_counts",
        "dropped_tensors",
        "versions",
    ):
        bad[name] = {key + HOSTILE: value for key, value in bad[name].items()}
    errors = bad["reparameterization"]
    for name in ("output_error", "mean_error", "sample_error"):
        errors[name] = {strategy + HOSTILE: value for strategy, value in errors[name].items()}
    html = page(bad)
    parsed = read(html)
    assert parsed.tags == plain.tags
    assert html.count("<svg") == html.count("</svg>")
    assert any(HOSTILE in mark.findtext("title", "") for svg in plots(html) for mark in marks(svg))
    assert html.count("alert") > len(bad["tensor_provenance"])


def test_unused_entries_are_listed():
    report = make_report()
    assert "unused" not in page(report)
    report["unused_entries"] = {"count": 12, "names": ["args", "<b>epoch</b>"]}
    assert "12 entries of the source: args, &lt;b&gt;epoch&lt;/b&gt; and 10 more" in page(report)


def test_name_that_is_not_utf8():
    report = make_report()
    report["source"] = b"/runs/caf\xe9.pt".decode("utf-8", "surrogateescape")
    assert b"/runs/caf?.pt" in page(report).encode()


def test_fold_names():
    names = [*(f"dit_blocks.{block}.mlp.linear1" for block in (3, 0, 1, 2, 7)), "patchify", "dit_blocks.4.adaLN1"]
    assert fold_names(names) == "dit_blocks.{0-3,7}.mlp.linear1, patchify, dit_blocks.{4}.adaLN1"


@pytest.mark.parametrize("values", [(0.0,), (1.0, 1.0), (-3.2, 41.0), (27.51, 27.53), (1e-7, 3e9), (-5e-9,)])
def test_axis_limits_are_round_numbers_around_the_values(values):
    axis = linear_axis("", [], *values)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 9
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == (axis.low, axis.high)
