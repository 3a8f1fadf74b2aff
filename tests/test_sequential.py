"""Anytime-valid intervals of a finite set: by hand, against enumeration in exact fractions, and their coverage."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from deepalign.errors import UserError
from deepalign.sequential import Seen, asking_order, check_precision, interval, precise_enough, round_ends


def enumerated(size: int, hits: int, misses: int, alpha: Fraction) -> list[int]:
    """The set from its definition: prior / posterior <= 1 / alpha, hypergeometric likelihood, uniform prior on S."""
    ways = {
        total: Fraction(math.comb(total, hits) * math.comb(size - total, misses), math.comb(size, hits + misses))
        for total in range(size + 1)
    }
    whole = sum(ways.values())
    prior = Fraction(1, size + 1)
    return [total for total, chance in ways.items() if chance > 0 and prior / (chance / whole) <= 1 / alpha]


@pytest.mark.parametrize("size", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_equals_the_enumerated_set(size: int, alpha: float) -> None:
    for hits, misses in itertools.product(range(size + 1), repeat=2):
        if hits + misses <= size:
            found = enumerated(size, hits, misses, Fraction(str(alpha)))
            assert found == list(range(found[0], found[-1] + 1)), "the set has no holes"
            low, high = interval(Seen(size=size, num_success=hits, num_failure=misses), alpha)
            assert (round(low * size), round(high * size)) == (found[0], found[-1]), (hits, misses)


def test_by_hand() -> None:
    # N = 4, one success asked: P(S) = S/4, m = 1/2. At alpha = 0.6 the bound is 0.3, so S is 2, 3 or 4.
    assert interval(Seen(size=4, num_success=1, num_failure=0), 0.6) == (0.5, 1.0)
    # Nothing asked: P = m = 1, and nothing is excluded.
    assert interval(Seen(size=7, num_success=0, num_failure=0)) == (0.0, 1.0)
    # All asked: the share itself.
    assert interval(Seen(size=8, num_success=3, num_failure=5)) == (0.375, 0.375)


def test_unscored_count_as_either() -> None:
    for hits, misses, unknown in ((3, 9, 2), (0, 12, 4), (12, 0, 1), (5, 5, 10)):
        seen = Seen(size=30, num_success=hits, num_failure=misses, num_unscored=unknown)
        could_be = [
            interval(Seen(size=30, num_success=hits + more, num_failure=misses + unknown - more))
            for more in range(unknown + 1)
        ]
        assert interval(seen) == (min(low for low, _ in could_be), max(high for _, high in could_be))


def test_a_whole_set_with_unscored_is_no_point() -> None:
    seen = Seen(size=10, num_success=4, num_failure=4, num_unscored=2)
    assert interval(seen) == (0.4, 0.6)
    assert precise_enough(seen, 0.1)
    assert not precise_enough(seen, 0.09)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 1.0])
def test_covers_at_every_look_at_once(share: float) -> None:
    size, draws = 120, 4000
    total = round(share * size)
    population = np.arange(size) < total
    generator = np.random.Generator(np.random.PCG64(26))
    hits = np.cumsum(generator.permuted(np.tile(population, (draws, 1)), axis=1), axis=1)
    ever_missed = np.zeros(draws, dtype=bool)
    for asked in range(1, size + 1):
        seen = hits[:, asked - 1]
        ends = {
            int(count): interval(Seen(size=size, num_success=int(count), num_failure=asked - int(count)))
            for count in np.unique(seen)
        }
        wrong = [count for count, (low, high) in ends.items() if not low <= total / size <= high]
        ever_missed |= np.isin(seen, wrong)
    # 0.05 and three standard errors of 4,000 draws.
    assert ever_missed.mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_stopping_early_is_what_wilson_does_not_allow() -> None:
    """A look after each prompt, at an interval made for one look, misses far more often than one time in twenty."""
    from deepalign.statistics import wilson

    size, draws = 400, 500
    population = np.arange(size) < size // 2
    generator = np.random.Generator(np.random.PCG64(26))
    hits = np.cumsum(generator.permuted(np.tile(population, (draws, 1)), axis=1), axis=1)[:, :100]
    missed = np.zeros(draws, dtype=bool)
    for asked in range(10, 101):
        ends = {int(count): wilson(count / asked, asked) for count in np.unique(hits[:, asked - 1])}
        wrong = [count for count, (low, high) in ends.items() if not low <= 0.5 <= high]
        missed |= np.isin(hits[:, asked - 1], wrong)
    assert missed.mean() > 0.15


def test_order_depends_on_seed_and_names_only() -> None:
    names = [f"p{number}" for number in range(50)]
    order = asking_order(names, 0)
    assert sorted(order) == sorted(names)
    assert asking_order(names[::-1], 0) == order
    assert asking_order(names, 1) != order
    assert asking_order(names[:20], 0) == [name for name in order if name in set(names[:20])]


def test_rounds_grow_and_end_with_all() -> None:
    assert list(round_ends(5)) == [5]
    assert list(round_ends(16)) == [16]
    assert list(round_ends(100)) == [16, 32, 48, 64, 80, 100]
    assert list(round_ends(300)) == [16, 32, 48, 64, 80, 100, 125, 156, 195, 243, 300]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, -0.03, math.nan, math.inf])
def test_a_useless_precision_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"above 0 and below 0\.5"):
        check_precision(value)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="not of a set of 3"):
        Seen(size=3, num_success=2, num_failure=2)
