"""Samples to numbers: Wilson by hand, the bootstrap's bounds, groups, and what counts as unread."""

from __future__ import annotations

import pytest

from deepalign.statistics import wilson
from deepalign.utility.scores import combined_interval, pooled, task_scores, with_main_first


def sample(name: str = "none", read: str = "text", **metrics: float) -> dict[str, object]:
    return {"filter": name, "metrics": list(metrics), "filtered_resps": [read], "arguments": [("", {})], **metrics}


def test_shares_have_numerator_denominator_and_wilsons_interval() -> None:
    found = task_scores([sample(acc=1.0), sample(acc=0.0), sample(acc=1.0), sample(acc=1.0)], {}, {"acc": True})
    (one,) = found
    assert (one["rate"], one["numerator"], one["denominator"], one["unit"]) == (0.75, 3, 4, "share")
    assert tuple(one["ci95"]) == wilson(0.75, 4)
    assert one["chance"] is None, "one argument is no multiple choice"


def test_an_unread_answer_is_wrong_and_counted_apart() -> None:
    samples = [sample("strict", "[invalid]", em=0.0), sample("strict", "7", em=1.0), sample("strict", " ", em=0.0)]
    (one,) = task_scores(samples, {}, {})
    assert (one["numerator"], one["denominator"], one["num_no_answer"]) == (1, 3, 2)
    own = [sample(score=0.0, no_answer=1.0), sample(score=1.0, no_answer=0.0)]
    (two,) = task_scores(own, {}, {}, ["no_answer"])
    assert (two["metric"], two["num_no_answer"], two["num_unscored"]) == ("score", 1, 0)


def test_a_metric_that_is_missing_from_a_sample_is_unscored_there() -> None:
    (one,) = task_scores([sample(f=0.5), {**sample(), "metrics": []}, sample(f=1.0)], {}, {})
    assert (one["rate"], one["denominator"], one["num_unscored"], one["numerator"]) == (0.75, 2, 1, None)


def test_other_numbers_keep_the_harness_aggregate_and_get_a_bootstrap() -> None:
    samples = [sample(ppl=value) for value in (1.0, 2.0, 3.0, 10.0)]
    (one,) = task_scores(samples, {"ppl": max}, {"ppl": False})
    assert (one["rate"], one["unit"], one["higher_is_better"]) == (10.0, "number", False)
    assert one["ci95"][0] <= one["ci95"][1] == 10.0


def test_filters_are_apart_and_the_named_one_comes_first() -> None:
    samples = [sample("strict", em=0.0), sample("flexible", em=1.0)]
    found = with_main_first(task_scores(samples, {}, {}), "em", "flexible")
    assert [one["filter"] for one in found] == ["flexible", "strict"]


def test_a_group_is_pooled_by_size_or_alike() -> None:
    large = task_scores([sample(acc=1.0)] * 6 + [sample(acc=0.0)] * 2, {}, {})[0]
    small = task_scores([sample(acc=0.0)] * 2, {}, {})[0]
    by_size, alike = pooled([large, small]), pooled([large, small], by_size=False)
    assert by_size is not None
    assert alike is not None
    assert (by_size["rate"], by_size["numerator"], by_size["denominator"]) == (pytest.approx(0.6), 6, 10)
    assert by_size["ci95"] == pytest.approx(wilson(0.6, 10))
    assert (alike["rate"], alike["numerator"]) == (0.375, None)
    assert pooled([{**small, "rate": None}]) is None


def test_the_interval_of_a_mean_is_mover_by_hand() -> None:
    one = {"rate": 0.5, "ci95": [0.3, 0.7]}
    other = {"rate": 0.9, "ci95": [0.8, 0.95]}
    low, high = combined_interval([one, other], [0.5, 0.5]) or (0, 0)
    assert low == pytest.approx(0.7 - (0.1**2 + 0.05**2) ** 0.5)
    assert high == pytest.approx(0.7 + (0.1**2 + 0.025**2) ** 0.5)
    assert combined_interval([one, {"rate": 1.0, "ci95": None}], [0.5, 0.5]) is None
