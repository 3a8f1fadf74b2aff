"""The figures, as SVG text for the page or as files.

Each function takes the metrics of one or several runs, draws those that hold the section, and raises `UserError` where
none does. Numbers are drawn as given. matplotlib is the `report` extra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from deepalign.errors import UserError
from deepalign.report import (
    attack_bars,
    attack_curves,
    bars,
    curves,
    dynamics_figures,
    finetuning_figures,
    margin_figures,
    utility_figures,
)
from deepalign.report.canvas import Drawing, Width
from deepalign.report.reading import SECTION_NAMES, Metrics, block, rate, rows, success_rate


def asr_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate by forced tokens, with interval bands, as SVG text."""
    return _drawing("asr_curve", metrics_list).svg(width)


def onset_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate at every k as the refusal onset predicts it, as SVG text."""
    return _drawing("onset_curve", metrics_list).svg(width)


def kl_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """KL divergence by response position, both directions, as SVG text."""
    return _drawing("kl_curve", metrics_list).svg(width)


def decoding_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate by decoding setting, as SVG text."""
    return _drawing("decoding_bars", metrics_list).svg(width)


def refusal_prefix_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Harmfulness with forced refusal prefixes, as SVG text."""
    return _drawing("refusal_prefix_bars", metrics_list).svg(width)


def over_refusal_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Refusals on benign prompts by prompt set, as SVG text."""
    return _drawing("over_refusal_bars", metrics_list).svg(width)


def category_heat(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate by category and forced tokens, as SVG text."""
    return _drawing("category_heat", metrics_list).svg(width)


def finetuning_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate after fine-tuning, by set and way, as SVG text."""
    return _drawing("finetuning_bars", metrics_list).svg(width)


def dynamics(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Loss, gradient norm and KL divergence by response position, and attack success rate, by step, as SVG text."""
    return _drawing("dynamics", metrics_list).svg(width)


def margin_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """What an opening needs at each response position beside what each schedule allows, as SVG text."""
    return _drawing("margin_curve", metrics_list).svg(width)


def margin_scatter(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Predicted highest attack success rate against the measured one, as SVG text."""
    return _drawing("margin_scatter", metrics_list).svg(width)


def worst_case_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Every attack at its strongest setting, weights-changing ones apart, plain asking last, as SVG text."""
    return _drawing("worst_case_bars", metrics_list).svg(width)


def rap_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate of rank-assisted prefilling beside plain prefilling, as SVG text."""
    return _drawing("rap_curve", metrics_list).svg(width)


def harmful_rank_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Share of harmful tokens among the most probable, and mass of refusals, by response position, as SVG text."""
    return _drawing("harmful_rank_curve", metrics_list).svg(width)


def any_depth_curve(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Share answered with any-depth re-injection beside plain prefilling, as SVG text."""
    return _drawing("any_depth_curve", metrics_list).svg(width)


def jailbreak_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate of each wrapping of the prompts, as SVG text."""
    return _drawing("jailbreak_bars", metrics_list).svg(width)


def suffix_losses(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Loss of each suffix search by step, as SVG text."""
    return _drawing("suffix_losses", metrics_list).svg(width)


def abliteration_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate with the refusal direction and without it, as SVG text."""
    return _drawing("abliteration_bars", metrics_list).svg(width)


def utility_bars(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Score of each task with its interval, as SVG text."""
    return _drawing("utility_bars", metrics_list).svg(width)


def trade_off(metrics_list: Sequence[Metrics], *, width: Width = "wide") -> str:
    """Attack success rate against utility, one point for each model, as SVG text."""
    return _drawing("trade_off", metrics_list).svg(width)


def save_figures(metrics_list: Sequence[Metrics], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every figure that the metrics hold numbers for, and return the paths.

    Args:
        metrics_list: The metrics of one or several runs.
        folder: Where to write; made if missing.
        formats: Any of svg, png, pdf. SVG follows the viewer's light or dark theme; the others have a white ground.
    """
    unknown = [kind for kind in formats if kind not in {"svg", "png", "pdf"}]
    if unknown:
        raise UserError(f"figure format {unknown[0]!r} is not known; use svg, png or pdf")
    paths = []
    for name in FIGURES:
        if drawable(name, metrics_list):
            drawing = _drawing(name, metrics_list)
            folder.mkdir(parents=True, exist_ok=True)
            for kind in formats:
                path = folder / f"{drawing.name}.{kind}"
                path.write_bytes(drawing.file(kind))
                paths.append(path)
    return paths


def drawable(name: str, metrics_list: Sequence[Metrics]) -> bool:
    """Whether some run holds a number that the figure of that name would show."""
    return name in _HAS_NUMBERS and any(_HAS_NUMBERS[name](run) for run in metrics_list)


FIGURES: dict[str, tuple[Callable[[Sequence[Metrics]], Drawing], str]] = {
    "worst_case_bars": (attack_bars.worst_case, "worst_case"),
    "asr_curve": (curves.asr, "prefill"),
    "onset_curve": (curves.onset, "refusal_onset"),
    "rap_curve": (attack_curves.rap, "rap"),
    "harmful_rank_curve": (attack_curves.harmful_rank, "harmful_rank"),
    "any_depth_curve": (attack_curves.any_depth, "any_depth"),
    "decoding_bars": (bars.decoding, "decoding"),
    "jailbreak_bars": (attack_bars.jailbreaks, "jailbreaks"),
    "suffix_losses": (attack_curves.suffix_losses, "suffix"),
    "abliteration_bars": (attack_bars.abliteration, "abliteration"),
    "kl_curve": (curves.kl, "kl"),
    "refusal_prefix_bars": (bars.refusal_prefix, "refusal_prefix"),
    "over_refusal_bars": (bars.over_refusal, "over_refusal"),
    "trade_off": (utility_figures.trade_off, "trade_off"),
    "utility_bars": (utility_figures.scores, "utility"),
    "category_heat": (bars.category_heat, "by_category"),
    "finetuning_bars": (finetuning_figures.asr_bars, "finetuning"),
    "dynamics": (dynamics_figures.dynamics, "dynamics"),
    "margin_curve": (margin_figures.margin_curve, "margin"),
    "margin_scatter": (margin_figures.scatter, "margin"),
}
"""Figure name -> how it is drawn, and the section it shows."""
_HAS_NUMBERS: dict[str, Callable[[Metrics], bool]] = {
    "worst_case_bars": attack_bars.has_attacks,
    "asr_curve": lambda run: curves.has_curve(run, "prefill"),
    "onset_curve": lambda run: curves.has_curve(run, "refusal_onset"),
    "rap_curve": attack_curves.has_rap,
    "harmful_rank_curve": attack_curves.has_ranks,
    "any_depth_curve": attack_curves.has_any_depth,
    "decoding_bars": lambda run: rate(block(run, "decoding").get("worst_case")).value is not None,
    "jailbreak_bars": lambda run: _some_rate(rows(run, "jailbreaks"), "asr"),
    "suffix_losses": attack_curves.has_losses,
    "abliteration_bars": attack_bars.has_ablated,
    "kl_curve": lambda run: curves.has_curve(run, "kl") or curves.has_curve(run, "kl_reverse"),
    "refusal_prefix_bars": lambda run: _some_rate(rows(run, "refusal_prefix"), "harmfulness"),
    "over_refusal_bars": lambda run: _some_rate(rows(run, "over_refusal"), "refusals"),
    "trade_off": utility_figures.has_point,
    "utility_bars": utility_figures.has_scores,
    "category_heat": lambda run: any(
        success_rate(row).value is not None for group in rows(run, "by_category") for row in rows(group, "rows")
    ),
    "finetuning_bars": finetuning_figures.has_rates,
    "dynamics": dynamics_figures.has_dynamics,
    "margin_curve": lambda run: margin_figures.has_numbers("margin_curve", run),
    "margin_scatter": lambda run: margin_figures.has_numbers("margin_scatter", run),
}
"""Figure name -> whether a run holds a number that it would show."""


def _drawing(name: str, metrics_list: Sequence[Metrics]) -> Drawing:
    draw, section = FIGURES[name]
    if not drawable(name, metrics_list):
        raise UserError(
            f"no run holds a number for {SECTION_NAMES[section]!r} (section {section!r}), so it cannot be drawn"
        )
    return draw(metrics_list)


def _some_rate(listed: Sequence[Metrics], field: str) -> bool:
    return any(rate(row.get(field)).value is not None for row in listed)
