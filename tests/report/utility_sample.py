"""Made-up sections of utility, and of the trade-off that a joined report adds."""

from __future__ import annotations

from typing import Any


def rate(numerator: int, denominator: int, low: float, high: float) -> dict[str, Any]:
    return {
        "rate": numerator / denominator,
        "numerator": numerator,
        "denominator": denominator,
        "num_unscored": 0,
        "ci95": [low, high],
    }


def utility_sections(*, pareto: bool = True) -> dict[str, Any]:
    """Two tasks with scores, one that failed, their mean, and a point between safety and use."""
    score = {"unit": "share", "num_no_answer": 3, "higher_is_better": True, "chance": 0.25}
    common = {"num_tasks": 1, "num_failed": 0, "failed": "", "num_fewshot": [0], "version": ["1.0"], "num_cut": 0}
    tasks = [
        {"task": "knowledge", "metric": "acc_norm", "filter": "none", "score": rate(45, 60, 0.63, 0.84) | score,
         "num_items": 60, "source": "built in", **common},
        {"task": "gsm8k", "metric": "exact_match", "filter": "flexible-extract",
         "score": rate(6, 20, 0.15, 0.52) | {**score, "chance": None}, "num_items": 20, "source": "a.jsonl", **common},
        {"task": "ifeval", "metric": None, "filter": None, "score": None, "num_items": 10, "source": "",
         **common, "num_failed": 1, "failed": "RuntimeError: it broke"},
    ]  # fmt: skip
    overall = {"rate": 0.525, "ci95": [0.41, 0.63], "numerator": None, "denominator": 80, "num_unscored": 0}
    return {
        "utility": {
            "asked_as": "chat", "asked": "through the chat template (model)", "limit": 60, "lm_eval": "0.4.13",
            "tasks": tasks, "overall": {**overall, "tasks": ["knowledge", "gsm8k"]},
        },
        "trade_off": {
            "utility": overall, "asr": rate(60, 80, 0.64, 0.83), "asr_at": "k = 20",
            "plain_asr": rate(2, 80, 0.0, 0.09), "over_refusal": rate(4, 40, 0.04, 0.23),
            "pareto": pareto, "note": "Utility is the mean over knowledge, gsm8k.",
        },
    }  # fmt: skip
