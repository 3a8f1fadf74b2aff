"""Audits and utility runs joined by weights: who meets whom, over which tasks, and who is beaten by nobody."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from deepalign.statistics import wilson
from deepalign.workflows.side_by_side import joined

Json = dict[str, Any]


def audit(name: str, weights: str, rates: dict[int, int], refused: int = 2) -> tuple[Path, Json]:
    rows = [
        {"k": k, "asr": hits / 10, "num_success": hits, "num_scored": 10, "num_unscored": 0,
         "ci95": list(wilson(hits / 10, 10))}
        for k, hits in rates.items()
    ]  # fmt: skip
    refusals = {"rate": refused / 20, "numerator": refused, "denominator": 20, "num_unscored": 1, "ci95": [0.0, 0.3]}
    return Path(name), {
        "model": name, "judge": "refusal", "prefill": rows, "models": {"target": {"fingerprint": weights}},
        "over_refusal": [{"set": "a", "refusals": refusals}, {"set": "b", "refusals": refusals}],
    }  # fmt: skip


def use(weights: str, scores: dict[str, int], hashes: str = "same") -> tuple[Path, Json]:
    rows = [
        {"task": task, "metric": "acc", "filter": "none", "data_hash": hashes, "num_fewshot": [0], "num_failed": 0,
         "score": {"rate": hits / 10, "numerator": hits, "denominator": 10, "num_unscored": 0, "unit": "share",
                   "ci95": list(wilson(hits / 10, 10)), "higher_is_better": True}}
        for task, hits in scores.items()
    ]  # fmt: skip
    section = {"asked": "as chat", "tasks": rows, "overall": None}
    return Path(f"use-{weights}"), {
        "model": "any name", "judge": "none", "models": {"target": {"fingerprint": weights}}, "utility": section,
    }  # fmt: skip


def test_utility_joins_the_audit_of_its_weights_whatever_it_is_called() -> None:
    found = joined([use("w1", {"a": 6, "b": 8}), audit("one", "w1", {0: 1, 5: 9}), use("w9", {"a": 1})])
    assert [data["model"] for _, data in found] == ["one", "any name"]
    place = found[0][1]["trade_off"]
    assert place["utility"]["rate"] == pytest.approx(0.6), "over the task that both were asked"
    assert (place["asr"]["rate"], place["asr_at"], place["plain_asr"]["rate"]) == (0.9, "k = 5", 0.1)
    assert (place["over_refusal"]["numerator"], place["over_refusal"]["denominator"]) == (4, 40)
    assert place["over_refusal"]["num_unscored"] == 2
    assert place["note"].endswith("left out, since not every run has the same items of it: b.")
    assert "pareto" not in place, "one point beats nobody"


def test_who_is_beaten_on_both() -> None:
    runs = [audit("safe", "1", {0: 0}), audit("useful", "2", {0: 8}), audit("neither", "3", {0: 8})]
    scores = [use("1", {"a": 3}), use("2", {"a": 9}), use("3", {"a": 3})]
    found = joined([*runs, *scores])
    assert [data["trade_off"]["pareto"] for _, data in found] == [True, True, False]


def test_other_items_are_not_compared() -> None:
    found = joined([
        audit("one", "1", {0: 0}), audit("two", "2", {0: 0}), use("1", {"a": 3}), use("2", {"a": 3}, "others"),
    ])  # fmt: skip
    assert [data["trade_off"]["utility"] for _, data in found] == [None, None]
    assert "no task" in found[0][1]["trade_off"]["note"]


def test_two_utility_runs_of_one_model_add_their_tasks_and_nothing_given_is_changed() -> None:
    given = [audit("one", "1", {0: 0}), use("1", {"a": 3}), use("1", {"a": 5, "b": 7})]
    before = copy.deepcopy(given)
    ((_, data),) = joined(given)
    assert [(row["task"], row["score"]["numerator"]) for row in data["utility"]["tasks"]] == [("a", 3), ("b", 7)]
    assert data["utility"]["overall"]["rate"] == pytest.approx(0.5)
    assert given == before


def test_runs_without_utility_are_left_as_they_are() -> None:
    given = [audit("one", "1", {0: 0}), audit("two", "2", {0: 0})]
    assert joined(given) == given
