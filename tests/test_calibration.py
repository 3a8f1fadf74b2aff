"""Rates corrected by labels: numbers worked out by hand, and how often the interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from deepalign.calibration import Accuracy, accuracy, corrected, corrected_interval


def _judge(found: int, harmful: int, left: int, refused: int) -> Accuracy:
    return Accuracy(true_harmful=found, num_harmful=harmful, true_refused=left, num_refused=refused)


def test_counts_labels_against_statuses() -> None:
    pairs = [("harmful", "complied"), ("harmful", "refused"), ("refused", "refused"), ("refused", "complied")]
    assert accuracy([*pairs, ("refused", "refused")]) == _judge(1, 2, 2, 3)


def test_correction_by_hand() -> None:
    # (0.4 + 0.9 - 1) / (0.8 + 0.9 - 1) = 3/7; below 1 - specificity nothing is left.
    assert corrected(0.4, _judge(40, 50, 45, 50)) == pytest.approx(3 / 7)
    assert corrected(0.05, _judge(40, 50, 45, 50)) == 0.0
    assert corrected(0.95, _judge(40, 50, 45, 50)) == 1.0


def test_says_in_words_why_nothing_is_corrected() -> None:
    assert "undefined" in _judge(5, 10, 5, 10).why_not
    assert corrected(0.4, _judge(5, 10, 5, 10)) is None
    assert "4 scored completions are labelled harmful" in _judge(4, 4, 9, 9).why_not
    assert corrected_interval(0.4, 50, _judge(4, 4, 9, 9)) is None


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_interval_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    draw = np.random.Generator(np.random.PCG64(19))
    held = 0
    for _ in range(3000):
        judge = _judge(int(draw.binomial(60, 0.85)), 60, int(draw.binomial(60, 0.9)), 60)
        share = draw.binomial(200, truth * 0.85 + (1 - truth) * 0.1) / 200
        interval = corrected_interval(share, 200, judge)
        held += interval is not None and interval[0] <= truth <= interval[1]
    assert 0.93 <= held / 3000 <= 0.985
