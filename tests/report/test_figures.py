"""Figures: deterministic, well-formed, escaped, and free of side effects."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from tests.report.attack_sample import attack_sections
from tests.report.utility_sample import utility_sections

from deepalign.errors import UserError
from deepalign.report import figures

Metrics = dict[str, Any]


@pytest.fixture
def metrics(metrics: Metrics, tuned: Metrics) -> Metrics:
    """The sample audit with all attacks and the sections of a fine-tuning run, so that every figure has its numbers."""
    tuning = {name: tuned[name] for name in ("finetuning", "dynamics", "margin")}
    return {**metrics, **attack_sections(), **utility_sections(), **tuning}


@pytest.mark.parametrize("name", list(figures.FIGURES))
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_svg_is_deterministic_and_safe(metrics: Metrics, deep: Metrics, name: str, width: str) -> None:
    draw = getattr(figures, name)
    svg = draw([metrics, deep], width=width)
    assert svg == draw([metrics, deep], width=width)
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert len(root.attrib["aria-label"]) > 60
    assert "<text" in svg
    assert "var(--ink" in svg
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)
    assert "<style" not in svg


def test_values_are_drawn_as_given(metrics: Metrics) -> None:
    svg = figures.asr_curve([metrics])
    shown = re.findall(r">([<>&;lgt\d]+)</text>", svg)
    for row in metrics["prefill"]:
        assert f"{100 * row['asr']:.0f}" in shown
        assert f"{100 * row['asr']:.0f} % at k = {row['k']}" in svg


def test_hostile_labels(metrics: Metrics, deep: Metrics) -> None:
    metrics["model"] = '<script>alert("1")</script> $x$ #1f5f99 id="a" \x00 \u202e \U0001f600'
    metrics["over_refusal"][0]["set"] = "]]></svg><!-- \u05d0\u05d1 --> & 'quoted'"
    for name in figures.FIGURES:
        svg = getattr(figures, name)([metrics, deep])
        ET.fromstring(svg)
        assert "<script" not in svg
        assert "\x00" not in svg


def test_caller_settings_are_untouched(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpl.rcParams, "font.size", 31.0)
    before = dict(mpl.rcParams)
    plain = figures.asr_curve([metrics])
    assert dict(mpl.rcParams) == before
    monkeypatch.setitem(mpl.rcParams, "font.size", 10.0)
    assert figures.asr_curve([metrics]) == plain


def test_gaps(metrics: Metrics) -> None:
    metrics["prefill"][2].update(asr=None, ci95=None)
    metrics["kl"][3].update(mean=None, ci95=None)
    metrics["by_category"][0]["rows"][0].update(asr=None)
    metrics["by_category"][1]["rows"].pop()
    metrics["refusal_prefix"][0]["harmfulness"]["rate"] = None
    for name in figures.FIGURES:
        ET.fromstring(getattr(figures, name)([metrics]))
    assert "not scored" in figures.refusal_prefix_bars([metrics])


@pytest.mark.parametrize(("name", "section"), [(name, section) for name, (_, section) in figures.FIGURES.items()])
def test_nothing_to_draw(metrics: Metrics, name: str, section: str) -> None:
    metrics[section] = None
    metrics["kl_reverse"] = None
    with pytest.raises(UserError, match=section):
        getattr(figures, name)([metrics])


def test_one_run_of_two(metrics: Metrics, deep: Metrics) -> None:
    for section in ("prefill", "kl", "kl_reverse", "refusal_prefix", "over_refusal", "by_category"):
        metrics[section] = None
    for name in figures.FIGURES:
        svg = getattr(figures, name)([metrics, deep])
        assert ET.fromstring(svg) is not None


def test_save_figures(metrics: Metrics, tmp_path: Path) -> None:
    metrics["by_category"] = None
    paths = figures.save_figures([metrics], tmp_path / "new", ("svg", "png"))
    assert [path.name for path in paths][:2] == ["worst-case-bars.svg", "worst-case-bars.png"]
    assert len(paths) == 2 * (len(figures.FIGURES) - 1)
    assert {"finetuning-bars.svg", "dynamics.svg", "margin-curve.svg", "margin-scatter.png"} <= {p.name for p in paths}
    assert "var(" not in paths[0].read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in paths[0].read_text(encoding="utf-8")
    ET.parse(paths[0])
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="bmp"):
        figures.save_figures([metrics], tmp_path, ("bmp",))


def test_missing_matplotlib_names_the_command(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'deepalign\[report\]'"):
        figures.asr_curve([metrics])
