"""Samples that the harness scored to numbers with intervals; groups of tasks, and one number over several tasks.

The value is the harness's own. A 0-1 metric has Wilson's interval, any other a bootstrap over items of the harness's
own aggregate. An answer that no rule could read is wrong, as the harness has it, and counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepalign.statistics import wilson

Json = dict[str, Any]
_DRAWS = 1000
_DRAWS_OF_SLOW = 100
_UNREADABLE = "[invalid]"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedTask:
    """What is kept of one task: its numbers, or why there are none."""

    task: str
    version: str
    source: str
    """Where its data came from."""
    data_hash: str
    """16 hex digits over the items that were asked; the same for the same items."""
    num_fewshot: int
    num_items: int
    """Items asked."""
    num_available: int
    scores: tuple[Json, ...] = ()
    """One entry for each metric and filter: name, value, parts and interval."""
    num_cut: int = 0
    """Contexts that were too long for the model and lost their beginning."""
    seconds: float = 0.0
    failed: str = ""
    """Why there are no numbers."""

    @property
    def main(self) -> Json | None:
        """The first score; None where the task failed."""
        return self.scores[0] if self.scores else None


def task_scores(
    samples: Sequence[Mapping[str, Any]],
    aggregation: Mapping[str, Callable[[list[Any]], float]],
    higher_is_better: Mapping[str, bool],
    apart: Sequence[str] = (),
) -> list[Json]:
    """One score for each metric and filter of a task.

    Args:
        samples: As the harness logs them: `filter`, `metrics`, a value under each metric's name, `filtered_resps`.
        aggregation: How values become the metric's number.
        higher_is_better: By metric.
        apart: Metrics that count answers which could not be read.
    """
    found = []
    for name in dict.fromkeys(str(sample["filter"]) for sample in samples):
        here = [sample for sample in samples if sample["filter"] == name]
        counted = [metric for metric in apart if any(metric in sample for sample in here)]
        unread = sum(any(sample.get(metric) for metric in counted) or _unread(sample) for sample in here)
        metrics = dict.fromkeys(metric for sample in here for metric in sample["metrics"])
        for metric in metrics:
            if metric in apart:
                continue
            values = [sample[metric] for sample in here if metric in sample]
            number = _number(values, aggregation.get(metric, _mean))
            found.append({
                "metric": metric,
                "filter": name,
                **number,
                "num_unscored": len(here) - len(values),
                "num_no_answer": unread,
                "higher_is_better": bool(higher_is_better.get(metric, True)),
                "chance": _chance(here) if metric in ("acc", "acc_norm") else None,
            })  # fmt: skip
    return found


def with_main_first(scores: Sequence[Json], metric: str | None, filter_name: str | None) -> list[Json]:
    """The scores, the one that stands for the task before the others; the harness's first where none is named."""
    return sorted(
        scores, key=lambda one: not (one["metric"] == metric and filter_name in (None, "none", one["filter"]))
    )


def pooled(scores: Sequence[Json], *, by_size: bool = True) -> Json | None:
    """The score of a group: the mean over its tasks, weighed by their items or each alike; None where none has one.

    The interval follows from the tasks' own (MOVER, Zou and Donner 2008): sum of squared distances to their ends.
    """
    known = [one for one in scores if one["rate"] is not None]
    if not known:
        return None
    sizes = [one["denominator"] if by_size else 1 for one in known]
    weights = [size / sum(sizes) for size in sizes]
    rate = math.fsum(weight * one["rate"] for weight, one in zip(weights, known, strict=True))
    counts = [one["numerator"] for one in known]
    whole = by_size and all(count is not None for count in counts)
    total = sum(one["denominator"] for one in known)
    chances = [one.get("chance") for one in known]
    return {
        "rate": rate,
        "numerator": sum(counts) if whole else None,
        "denominator": total,
        "ci95": list(wilson(rate, total)) if whole else combined_interval(known, weights),
        "unit": "share" if all(one["unit"] == "share" for one in known) else "number",
        "num_unscored": sum(one["num_unscored"] for one in scores),
        "num_no_answer": sum(one["num_no_answer"] for one in scores),
        "higher_is_better": all(one["higher_is_better"] for one in known),
        "chance": None if None in chances else math.fsum(w * c for w, c in zip(weights, chances, strict=True) if c),
    }


def combined_interval(scores: Sequence[Json], weights: Sequence[float]) -> list[float] | None:
    """95 % interval of a weighted sum of independent numbers from their own intervals; None where one has none."""
    if any(one["ci95"] is None for one in scores):
        return None
    rate = math.fsum(weight * one["rate"] for weight, one in zip(weights, scores, strict=True))
    down = math.fsum((w * (one["rate"] - one["ci95"][0])) ** 2 for w, one in zip(weights, scores, strict=True))
    up = math.fsum((w * (one["ci95"][1] - one["rate"])) ** 2 for w, one in zip(weights, scores, strict=True))
    return [rate - math.sqrt(down), rate + math.sqrt(up)]


def _number(values: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> Json:
    """Value, parts, interval and unit of a metric."""
    if not values:
        return {"rate": None, "numerator": None, "denominator": 0, "ci95": None, "unit": "share"}
    value = float(aggregate(list(values)))
    numbers = [float(one) for one in values] if all(isinstance(one, int | float) for one in values) else None
    if numbers is not None and set(numbers) <= {0.0, 1.0} and math.isclose(value, sum(numbers) / len(numbers)):
        return {
            "rate": value,
            "numerator": int(sum(numbers)),
            "denominator": len(numbers),
            "ci95": list(wilson(value, len(numbers))),
            "unit": "share",
        }
    return {
        "rate": value if math.isfinite(value) else None,
        "numerator": None,
        "denominator": len(values),
        "ci95": _bootstrap(values, numbers, value, aggregate),
        "unit": "share" if 0 <= value <= 1 and (numbers is None or all(0 <= one <= 1 for one in numbers)) else "number",
    }


def _bootstrap(
    values: Sequence[Any], numbers: Sequence[float] | None, value: float, aggregate: Callable[[list[Any]], float]
) -> list[float] | None:
    """95 % percentile bootstrap over items; None for fewer than two of them, or a number that is none."""
    if len(values) < 2 or not math.isfinite(value):
        return None
    draw = np.random.Generator(np.random.PCG64(0))
    if numbers is not None and math.isclose(value, sum(numbers) / len(numbers)):
        array = np.asarray(numbers)
        drawn = array[draw.integers(0, len(array), size=(_DRAWS, len(array)))].mean(axis=1)
    else:
        picks = draw.integers(0, len(values), size=(_DRAWS_OF_SLOW, len(values)))
        drawn = np.asarray([aggregate([values[place] for place in row]) for row in picks], dtype=np.float64)
    if not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [float(low), float(high)]


def _mean(values: Sequence[Any]) -> float:
    return math.fsum(map(float, values)) / len(values)


def _unread(sample: Mapping[str, Any]) -> bool:
    """Whether the filter found no answer in what the model wrote."""
    read = sample.get("filtered_resps") or [""]
    return bool(all(isinstance(one, str) and one.strip() in ("", _UNREADABLE) for one in read))


def _chance(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Score of blind guessing in multiple choice: the mean of one over the number of choices."""
    counts = [len(sample.get("arguments") or ()) for sample in samples]
    return math.fsum(1 / count for count in counts) / len(counts) if counts and min(counts) > 1 else None
