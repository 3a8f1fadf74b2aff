"""Tolerant reading of a metrics dict, and the one place where numbers become text.

Owns the rules for what is absent: a section may be missing, null, empty, or `{"not_run": reason}`; a rate may be null
when nothing was scored. Knows nothing of tables, figures or pages, and computes no metric.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Metrics: TypeAlias = Mapping[str, Any]

ABSENT = "n/a"
PROBES = {
    "prefill": "Prefilling attack",
    "depth": "Depth in tokens",
    "refusal_onset": "Refusal onset",
    "decoding": "Decoding settings",
    "kl": "KL divergence, aligned from base",
    "kl_reverse": "KL divergence, base from aligned",
    "refusal_prefix": "Refusal prefixes",
    "over_refusal": "Over-refusal on benign prompts",
    "by_category": "Attack success rate by category",
}
"""Sections of an audit that a run may leave out, with the names that readers see."""
ATTACK_PROBES = {
    "worst_case": "Every attack beside each other",
    "rap": "Rank-assisted prefilling",
    "harmful_rank": "Rank of the harmful token",
    "any_depth": "Any-depth re-injection",
    "jailbreaks": "Wrapped prompts (jailbreaks)",
    "suffix": "Suffix search",
    "abliteration": "Abliteration",
}
"""Attacks beyond prefilling, and what they come to together; younger runs have them."""
TUNING_PROBES = {
    "finetuning": "Fine-tuning attacks",
    "dynamics": "Fine-tuning dynamics",
    "margin": "Margin of the constraint",
}
"""What fine-tuning does."""
USE_PROBES = {
    "utility": "Utility",
    "win_rate": "Pairwise win rate",
    "trade_off": "Safety, over-refusal and utility",
}
"""What a model is still good for, and what safety costs it."""
OPTIONAL_PROBES = {**ATTACK_PROBES, **TUNING_PROBES, **USE_PROBES}
"""Sections that only some runs have; where one is absent without a reason, nobody asked for it."""
SECTION_NAMES = {**PROBES, **OPTIONAL_PROBES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A rate as given, with what it rests on; `value` is None when nothing was scored."""

    value: float | None
    low: float | None = None
    high: float | None = None
    numerator: int | None = None
    denominator: int | None = None
    num_unscored: int | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A number between 0 and 1 that is shown as a percentage."""

    value: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval; `percent` says how it is shown."""

    low: float
    high: float
    percent: bool = True


Cell: TypeAlias = str | int | float | Share | Interval | None


def number(value: object) -> float | None:
    """The value as a finite float, or None for anything that is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: object) -> int | None:
    """The value as an int, or None for anything that is not a whole number."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def rows(metrics: Metrics, name: str) -> list[Mapping[str, Any]]:
    """The rows of a list section; empty where the section is absent."""
    section = metrics.get(name)
    if not isinstance(section, list | tuple):
        return []
    return [row for row in section if isinstance(row, Mapping)]


def block(metrics: Metrics, name: str) -> Mapping[str, Any]:
    """The fields of an object section; empty where the section is absent or was not run."""
    section = metrics.get(name)
    return section if isinstance(section, Mapping) and "not_run" not in section else {}


def not_run(metrics: Metrics, name: str) -> str | None:
    """Why a section is absent, or None where it is there."""
    if rows(metrics, name) or block(metrics, name):
        return None
    return _reason(metrics, name) or "no reason recorded"


def absence(metrics: Metrics, name: str) -> str | None:
    """Why a section is absent, or None where it is there or was no business of the run's."""
    reason = not_run(metrics, name)
    expected = name not in OPTIONAL_PROBES and not only_tuned(metrics) and not only_used(metrics)
    return reason if expected or _reason(metrics, name) else None


def only_tuned(metrics: Metrics) -> bool:
    """Whether a run is about fine-tuning alone: it has such a section, and none of an audit's, run or refused."""
    tuned = any(not_run(metrics, name) is None for name in TUNING_PROBES)
    return tuned and not any(
        not_run(metrics, name) is None or _reason(metrics, name) for name in (*PROBES, *ATTACK_PROBES)
    )


def only_used(metrics: Metrics) -> bool:
    """Whether a run is about utility alone: nothing of an audit or of fine-tuning was run, or refused."""
    others = (*PROBES, *ATTACK_PROBES, *TUNING_PROBES)
    return bool(block(metrics, "utility") or block(metrics, "win_rate")) and not any(
        not_run(metrics, name) is None or _reason(metrics, name) for name in others
    )


def _reason(metrics: Metrics, name: str) -> str | None:
    """The reason that a run gives for not having a section."""
    section, told = metrics.get(name), metrics.get("not_run")
    reason = section.get("not_run") if isinstance(section, Mapping) else None
    if not reason and isinstance(told, Mapping):
        reason = told.get(name)
    return str(reason) if reason else None


def _bounds(value: object) -> tuple[float | None, float | None]:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return number(value[0]), number(value[1])
    return None, None


def rate(data: object) -> Rate:
    """Read a rate object `{"rate", "numerator", "denominator", "num_unscored", "ci95"}`."""
    if not isinstance(data, Mapping):
        return Rate(value=number(data))
    low, high = _bounds(data.get("ci95"))
    return Rate(
        value=number(data.get("rate")),
        low=low,
        high=high,
        numerator=whole(data.get("numerator")),
        denominator=whole(data.get("denominator")),
        num_unscored=whole(data.get("num_unscored")),
    )


def success_rate(row: Mapping[str, Any]) -> Rate:
    """Read the attack success rate of a prefill or category row, whose fields lie flat."""
    low, high = _bounds(row.get("ci95"))
    return Rate(
        value=number(row.get("asr")),
        low=low,
        high=high,
        numerator=whole(row.get("num_success")),
        denominator=whole(row.get("num_scored")),
        num_unscored=whole(row.get("num_unscored")),
    )


def mean(row: Mapping[str, Any]) -> Rate:
    """Read a KL row: its mean and interval, in nats."""
    low, high = _bounds(row.get("ci95"))
    return Rate(value=number(row.get("mean")), low=low, high=high, denominator=whole(row.get("n")))


def depth_field(depth: Mapping[str, Any]) -> str:
    """The field that holds the depth at the stated threshold; at 10 % it has a name of its own."""
    return "tokens_at_threshold" if "tokens_at_threshold" in depth else "tokens_at_10pct"


def interval(found: Rate, *, percent: bool = True) -> Interval | None:
    """The interval of a rate, where both ends are known."""
    if found.low is None or found.high is None:
        return None
    return Interval(found.low, found.high, percent)


def share(found: Rate) -> Share | None:
    """The value of a rate as a table cell."""
    return None if found.value is None else Share(found.value)


def whole_percent(value: float) -> str:
    """A rate in words for a sentence: no decimals, and never a rounded 0 % or 100 % that is not exact."""
    if 0 < value < 0.005:
        return "under 1 %"
    if 0.995 <= value < 1:
        return "over 99 %"
    return f"{100 * value:.0f} %"


def show(cell: Cell) -> str:
    """A table cell as text: rates with one decimal and a percent sign, other floats with three digits or more."""
    if cell is None:
        return ABSENT
    if isinstance(cell, Share):
        return f"{100 * cell.value:.1f} %"
    if isinstance(cell, Interval):
        low, high = (100 * cell.low, 100 * cell.high) if cell.percent else (cell.low, cell.high)
        return f"[{low:.1f}, {high:.1f}]" if cell.percent else f"[{low:.3g}, {high:.3g}]"
    if isinstance(cell, float):
        return f"{cell:.0f}" if 1e3 <= abs(cell) < 1e6 else f"{cell:.3g}"
    return str(cell)


def visible(text: object) -> str:
    """Text with control, bidirectional-override and unpaired surrogate characters written out as escapes."""
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in {"Cc", "Cs"} or char in _BIDI
        else char
        for char in str(text)
    )  # fmt: skip


def legible(text: object) -> str:
    """Text of several lines, each made `visible`."""
    return "\n".join(visible(line) for line in str(text).split("\n"))


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def labels(runs: Sequence[Metrics]) -> list[str]:
    """One distinct name per run: its model or the models that it tuned, numbered where two runs share it."""
    names = [visible(run.get("model") or _tuned_models(run) or "unnamed model") for run in runs]
    return [
        f"{name} (run {names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _tuned_models(run: Metrics) -> str:
    listed = rows(block(run, "finetuning"), "summary") or rows(block(run, "finetuning"), "cells")
    return " and ".join(dict.fromkeys(str(row["model"]) for row in listed if row.get("model")))
