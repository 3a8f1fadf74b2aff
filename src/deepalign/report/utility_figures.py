"""Figures of utility: the score of each task, and attack success against utility, one point for each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepalign.report.bars import Bars, bar_chart
from deepalign.report.canvas import MARKERS, Drawing, Width, bare, colour, legend, percent_axis, short
from deepalign.report.reading import Metrics, Rate, block, labels, rate, rows, visible, whole_percent
from deepalign.report.svg import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_scores(run: Metrics) -> bool:
    """Whether a run holds a score that is a share."""
    return bool(_scores(run))


def has_point(run: Metrics) -> bool:
    """Whether a run holds both a utility and an attack success rate."""
    return _point(run) is not None


def scores(runs: Sequence[Metrics]) -> Drawing:
    """The score of each task as a bar, one for each model."""
    series: Bars = {name: _scores(run) for run, name in zip(runs, labels(runs), strict=True)}
    palette = {name: colour(index) for index, name in enumerate(series)}
    return bar_chart("utility-bars", "score by task", "score", series, palette)


def trade_off(runs: Sequence[Metrics]) -> Drawing:
    """Attack success rate against utility: the better a model, the further to the lower right."""
    points = [(name, point) for name, run in zip(labels(runs), runs, strict=True) if (point := _point(run))]

    def draw(figure: Figure, width: Width) -> None:
        axes = figure.add_subplot()
        bare(axes, grid="y")
        front = sorted(((use.value or 0, asr.value or 0) for _, (use, asr, best) in points if best), key=lambda p: p[0])
        if len(front) > 1:
            axes.step(
                [x for x, _ in front], [y for _, y in front], where="post", color=MUTED.light, linewidth=1.0,
                linestyle=(0, (4, 3)), zorder=1,
            )  # fmt: skip
        for index, (name, (use, asr, best)) in enumerate(points):
            _cross(axes, use, asr, colour(index))
            axes.plot(
                [use.value or 0], [asr.value or 0], marker=MARKERS[index % len(MARKERS)], markersize=8,
                color=colour(index), markerfacecolor=colour(index) if best else "none", linestyle="none",
                label=short(name, "wide"), zorder=3, clip_on=False,
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.03, 1.03)
        percent_axis(axes, "x")
        percent_axis(axes, "y")
        axes.set_xlabel("utility: mean score over tasks")
        axes.set_ylabel("attack success rate")
        axes.annotate(
            "safer and more useful", (1, 0), xytext=(-4, 6), textcoords="offset points", ha="right", va="bottom",
            fontsize=8.5, color=MUTED.light,
        )  # fmt: skip
        legend(figure, axes, width)
        if len(points) == 1:
            axes.set_title(short(points[0][0], width), loc="left", fontsize=9, color=INK.light)

    spoken = [
        f"{name}: attack success rate {whole_percent(asr.value or 0)}, utility {whole_percent(use.value or 0)}"
        f"{', not beaten on both' if best and len(points) > 1 else ''}."
        for name, (use, asr, best) in points
    ]
    alt = "Scatter plot of attack success rate against utility. " + " ".join(spoken)
    return Drawing("trade-off", draw, lambda width: 3.6 if width == "wide" else 3.4, alt)


def _scores(run: Metrics) -> dict[str, Rate]:
    return {
        visible(row.get("task", "")): rate(row.get("score"))
        for row in rows(block(run, "utility"), "tasks")
        if block(row, "score").get("unit") == "share" and rate(row.get("score")).value is not None
    }


def _point(run: Metrics) -> tuple[Rate, Rate, bool] | None:
    section = block(run, "trade_off")
    use, asr = rate(section.get("utility")), rate(section.get("asr"))
    return None if use.value is None or asr.value is None else (use, asr, section.get("pareto") is not False)


def _cross(axes: Axes, use: Rate, asr: Rate, shade: str) -> None:
    x, y = use.value or 0, asr.value or 0
    if use.low is not None and use.high is not None:
        axes.plot([use.low, use.high], [y, y], color=shade, linewidth=1.3, zorder=2, clip_on=False)
    if asr.low is not None and asr.high is not None:
        axes.plot([x, x], [asr.low, asr.high], color=shade, linewidth=1.3, zorder=2, clip_on=False)
