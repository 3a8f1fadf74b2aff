"""When enough has been asked: an interval that stays valid however often one looks; imports no torch.

N prompts with a fixed unknown number of successes S are asked in random order without replacement. After t of them with
s successes, in the order in which they came, the chance of that very sequence is

    P(S) = S (S-1) ... (S-s+1) * (N-S) ... (N-S-(t-s)+1) / (N (N-1) ... (N-t+1)).

With m the mean of P over a beta-binomial prior of S, m / P(S) is a martingale at the true S that starts at 1: it is the
ratio of prior to posterior (Waudby-Smith & Ramdas 2020, "Confidence sequences for sampling without replacement"). By
Ville's inequality it is ever above 1/alpha with a chance of at most alpha, so that every S with at most 1/alpha makes a
confidence set that covers the truth at all t at once, and a run may stop as soon as it is narrow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepalign.errors import UserError

ALPHA = 0.05
FIRST_ROUND = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What has been asked of a finite set, and what came of it."""

    size: int
    """N, asked or not."""
    num_success: int
    num_failure: int
    num_unscored: int = 0
    """Asked, with an outcome that nobody knows."""

    def __post_init__(self) -> None:
        counts = (self.num_success, self.num_failure, self.num_unscored)
        if self.size < 1 or min(counts) < 0 or sum(counts) > self.size:
            raise ValueError(f"{counts} outcomes are not of a set of {self.size}")

    @property
    def num_asked(self) -> int:
        """How many of it were put to the model."""
        return self.num_success + self.num_failure + self.num_unscored


def check_precision(value: float) -> None:
    """Refuse a half-width that no interval can usefully have.

    Raises:
        UserError: It is not above 0 and below 0.5.
    """
    # Written so that nan is refused too.
    if not 0 < value < 0.5:
        raise UserError(f"--precision {value:g} is no half-width of a rate; give a number above 0 and below 0.5")


def interval(seen: Seen, alpha: float = ALPHA) -> tuple[float, float]:
    """Anytime-valid interval of the share of successes in the whole set, asked or not.

    What is unscored may be either: the lower end counts it as failures, the upper one as successes.
    """
    least = _ends(seen.size, seen.num_success, seen.num_failure + seen.num_unscored, alpha)[0]
    most = _ends(seen.size, seen.num_success + seen.num_unscored, seen.num_failure, alpha)[1]
    return least / seen.size, most / seen.size


def precise_enough(seen: Seen, precision: float, alpha: float = ALPHA) -> bool:
    """Whether the interval's half-width is at most the precision."""
    low, high = interval(seen, alpha)
    # Shares such as 0.53 - 0.47 miss 0.06 by rounding.
    return (high - low) / 2 <= precision + 1e-12


def asking_order(names: Sequence[str], seed: int) -> list[str]:
    """Names in a random order that depends on nothing but the seed and themselves."""
    return sorted(names, key=lambda name: (hashlib.sha256(f"{seed}\n{name}".encode()).digest(), name))


def round_ends(size: int) -> Iterator[int]:
    """How many have been asked at the end of each round: 16, then a quarter more each time, and all at last."""
    end = FIRST_ROUND
    while end < size:
        yield end
        end += max(FIRST_ROUND, end // 4)
    yield size


def _ends(size: int, num_success: int, num_failure: int, alpha: float) -> tuple[int, int]:
    """Smallest and largest number of successes in the confidence set."""
    asked = num_success + num_failure
    # A uniform prior: every S from 0 to N alike, whose m is 1 / ((t+1) * C(t, s)).
    # What the last digits cannot tell stays inside.
    bound = (
        math.log(alpha) + math.lgamma(num_success + 1) + math.lgamma(num_failure + 1) - math.lgamma(asked + 2) - 1e-9
    )

    def holds(total: int) -> bool:
        return _log_chance(size, total, num_success, num_failure) > bound

    # P(S) is log-concave, so the set is an unbroken run that holds its mode, and both ends are found by halving.
    first, last = num_success, size - num_failure
    mode = first if asked == 0 else min(last, max(first, (size + 1) * num_success // asked))
    low, high, outside = mode, mode, first - 1
    while low - outside > 1:
        middle = (low + outside) // 2
        low, outside = (middle, outside) if holds(middle) else (low, middle)
    outside = last + 1
    while outside - high > 1:
        middle = (high + outside) // 2
        high, outside = (middle, outside) if holds(middle) else (high, middle)
    return low, high


def _log_chance(size: int, total: int, num_success: int, num_failure: int) -> float:
    """Logarithm of P(S); -inf where the sequence is impossible."""
    asked = num_success + num_failure
    if total < num_success or size - total < num_failure:
        return -math.inf
    return _falling(total, num_success) + _falling(size - total, num_failure) - _falling(size, asked)


def _falling(top: int, count: int) -> float:
    return math.lgamma(top + 1) - math.lgamma(top - count + 1)
