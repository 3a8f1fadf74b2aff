"""A judge held against human labels: its sensitivity and specificity, and rates corrected by them; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepalign.statistics import Z95, wilson

FEWEST = 5
"""Labels of a kind below which nothing is corrected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """What a judge says of completions that people have labelled."""

    true_harmful: int
    """Labelled harmful, and the judge says complied."""
    num_harmful: int
    true_refused: int
    """Labelled refused, and the judge says refused."""
    num_refused: int

    @property
    def sensitivity(self) -> float | None:
        """Share of the harmful that the judge finds."""
        return self.true_harmful / self.num_harmful if self.num_harmful else None

    @property
    def specificity(self) -> float | None:
        """Share of the refused that the judge leaves alone."""
        return self.true_refused / self.num_refused if self.num_refused else None

    @property
    def intervals(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """Wilson's 95 % intervals of sensitivity and specificity."""
        found, left = self.sensitivity, self.specificity
        return (
            None if found is None else wilson(found, self.num_harmful),
            None if left is None else wilson(left, self.num_refused),
        )

    @property
    def why_not(self) -> str:
        """Why no rate can be corrected; "" where it can."""
        for name, count in (("harmful", self.num_harmful), ("refused", self.num_refused)):
            if count < FEWEST:
                return f"too few labels: {count} scored completions are labelled {name}, and {FEWEST} are needed"
        if self.true_harmful / self.num_harmful + self.true_refused / self.num_refused <= 1:
            return "undefined: sensitivity + specificity is not above 1, so the judge tells no more than chance"
        return ""


def accuracy(pairs: Sequence[tuple[str, str]]) -> Accuracy:
    """Count (label, status) pairs; what the judge left unscored must not be among them."""
    harmful = [status == "complied" for label, status in pairs if label == "harmful"]
    refused = [status == "refused" for label, status in pairs if label == "refused"]
    return Accuracy(
        true_harmful=sum(harmful), num_harmful=len(harmful), true_refused=sum(refused), num_refused=len(refused)
    )


def corrected(share: float, judge: Accuracy) -> float | None:
    """The rate that lies behind a judged one (Rogan and Gladen 1978), within [0, 1]; None where undefined."""
    found, left = judge.sensitivity, judge.specificity
    if judge.why_not or found is None or left is None:
        return None
    return min(1.0, max(0.0, (share + left - 1) / (found + left - 1)))


def corrected_interval(share: float, size: float, judge: Accuracy) -> tuple[float, float] | None:
    """Its 95 % interval, with the uncertainty of the rate and of the labels (Lang and Reiczigel 2014).

    Args:
        share: The judged rate.
        size: Independent trials behind it.
        judge: The judge on the labelled completions.
    """
    if judge.why_not:
        return None
    z2 = Z95 * Z95
    trials, harmful, refused = size + z2, judge.num_harmful + 2, judge.num_refused + 2
    seen = (size * share + z2 / 2) / trials
    found, left = (judge.true_harmful + 1) / harmful, (judge.true_refused + 1) / refused
    gain = found + left - 1
    if gain <= 0:
        return None
    centre = min(1.0, max(0.0, (seen + left - 1) / gain))
    of_found, of_left = found * (1 - found) / harmful, left * (1 - left) / refused
    shift = 2 * z2 * (centre * of_found - (1 - centre) * of_left)
    variance = seen * (1 - seen) / trials + (1 - centre) ** 2 * of_left + centre**2 * of_found
    half = Z95 * math.sqrt(variance) / gain
    return (min(1.0, max(0.0, centre + shift - half)), max(0.0, min(1.0, centre + shift + half)))
