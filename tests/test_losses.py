"""The constrained objective: numbers by hand, its gradient, a slow twin, and what must not change it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.losses import TokenStrength, constrained_token_loss, response_positions, turn_lengths, turn_positions

STRENGTHS = [TokenStrength(), TokenStrength.uniform(0.1), TokenStrength(first=3.0, early=0.2, rest=1.5, num_early=2)]


def a_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of eleven positions, with padding on both sides, prompts, and one row without any response."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-3 * torch.rand(3, 11, generator=generator, dtype=torch.float64) - 0.01 for _ in range(2))
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[0, 2:11] = True
    mask[1, 0:3] = True
    return policy.to(dtype), reference.to(dtype), mask


def textbook(policy: Tensor, reference: Tensor, mask: Tensor, strength: TokenStrength) -> float:
    """Eq. 3 as it is written, a token at a time: -(2 / beta) log sigmoid(beta log(pi / pi_ref))."""
    total = 0.0
    for row in range(mask.shape[0]):
        position = 0
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            beta = strength.first if position == 0 else strength.early
            beta = beta if position < strength.num_early else strength.rest
            ratio = math.exp(float(policy[row, column])) / math.exp(float(reference[row, column]))
            total -= 2 / beta * math.log(1 / (1 + ratio**-beta))
            position += 1
    return total


@pytest.mark.parametrize("strength", STRENGTHS)
def test_it_is_equation_3(strength: TokenStrength) -> None:
    policy, reference, mask = a_batch()
    found = constrained_token_loss(policy, reference, mask, strength)
    assert float(found.total) == pytest.approx(textbook(policy, reference, mask, strength), rel=1e-12)
    assert int(found.count) == 12
    assert float(found.mean) == pytest.approx(float(found.total) / 12)


def test_by_hand() -> None:
    """Nothing moved: (2 / beta) ln 2 and weight 1. A token 3^(1 / beta) times as likely: (2 / beta) ln(4/3) and 1/2."""
    mask = torch.ones(1, 6, dtype=torch.bool)
    betas = torch.tensor([[0.5, 2.0, 2.0, 2.0, 2.0, 0.1]])
    reference = torch.full((1, 6), -2.0)
    still = constrained_token_loss(reference, reference, mask)
    assert float(still.total) == pytest.approx(float((2 / betas * math.log(2)).sum()), rel=1e-6)
    assert still.weights_BT.tolist() == [[1.0] * 6]
    moved = constrained_token_loss(reference + math.log(3) / betas, reference, mask)
    assert float(moved.total) == pytest.approx(float((2 / betas * math.log(4 / 3)).sum()), rel=1e-5)
    assert moved.weights_BT[0].tolist() == pytest.approx([0.5] * 6)


def gradient(**settings: Any) -> tuple[Tensor, Any]:
    policy, reference, mask = a_batch()
    policy.requires_grad_()
    found = constrained_token_loss(policy, reference, mask, **settings)
    found.total.backward()
    assert policy.grad is not None
    return policy.grad, found


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.9, 1.2])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_gradient_is_weighted_cross_entropys(strength: TokenStrength, floor: float) -> None:
    """Eq. 5: cross-entropy's gradient is -1 for each token's log-probability."""
    grad, found = gradient(strength=strength, weight_floor=floor)
    assert torch.allclose(grad, -found.weights_BT, rtol=1e-10)
    policy, reference, mask = a_batch()
    beta = strength.at(response_positions(mask), torch.float64)
    expected = (2 * torch.sigmoid(beta * (reference - policy))).clamp(min=floor)
    assert torch.allclose(found.weights_BT, torch.where(mask, expected, 0.0))
    assert float(found.weights_BT[2].sum()) == 0.0


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_loss_is_the_integral_of_its_gradient(floor: float) -> None:
    policy, reference, mask = a_batch()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logps: constrained_token_loss(logps, reference, mask, weight_floor=floor).total, (policy,)
    )


def test_a_vanishing_strength_is_plain_fine_tuning() -> None:
    grad, _ = gradient(strength=TokenStrength.uniform(1e-7))
    _, _, mask = a_batch()
    assert torch.allclose(grad, -mask.double(), atol=1e-6)


def test_a_huge_strength_is_a_hinge() -> None:
    """2 max(0, log pi_ref - log pi): tokens that have become likelier are left alone."""
    policy, reference, mask = a_batch()
    found = constrained_token_loss(policy, reference, mask, TokenStrength.uniform(1e6))
    expected = 2 * (reference - policy).clamp(min=0)[mask].sum()
    assert float(found.total) == pytest.approx(float(expected), rel=1e-4)
    assert set(found.weights_BT[mask].tolist()) == {0.0, 2.0}


def test_what_stands_off_the_response_does_not_matter() -> None:
    policy, reference, mask = a_batch()
    expected = float(constrained_token_loss(policy, reference, mask).total)
    dirty = policy.masked_fill(~mask, float("nan")).requires_grad_()
    found = constrained_token_loss(dirty, reference.masked_fill(~mask, float("inf")), mask)
    found.total.backward()
    assert float(found.total.detach()) == pytest.approx(expected)
    assert dirty.grad is not None
    assert bool(torch.isfinite(dirty.grad).all())


def test_a_response_token_that_is_no_number_shows() -> None:
    policy, reference, mask = a_batch()
    policy[0, 4] = float("nan")
    assert bool(constrained_token_loss(policy, reference, mask).total.isnan())


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_padding_on_either_side_does_not_matter(shift: int) -> None:
    policy, reference, mask = (part[:, :6] for part in a_batch())
    expected = constrained_token_loss(policy, reference, mask)
    wide = [torch.nn.functional.pad(part.double(), (shift, 7 - shift), value=0.5) for part in (policy, reference)]
    found = constrained_token_loss(*wide, torch.nn.functional.pad(mask, (shift, 7 - shift)))
    assert float(found.total) == pytest.approx(float(expected.total))
    assert int(found.count) == int(expected.count)


@pytest.mark.parametrize("reduction", ["token", "sequence_sum", "sequence_mean"])
def test_parts_of_a_batch_add_up_to_the_whole(reduction: Any) -> None:
    """What ranks and accumulation steps do; a row without a response is no sequence."""
    policy, reference, mask = a_batch()
    whole = constrained_token_loss(policy, reference, mask, reduction=reduction)
    parts = [constrained_token_loss(policy[i : i + 1], reference[i : i + 1], mask[i : i + 1], reduction=reduction)
             for i in range(3)]  # fmt: skip
    assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total))
    assert int(sum(part.count for part in parts)) == int(whole.count) == (12 if reduction == "token" else 2)
    first, second = (constrained_token_loss(policy[i], reference[i], mask[i]).total for i in (slice(0, 1), slice(1, 2)))
    expected = first / 9 + second / 3 if reduction == "sequence_mean" else first + second
    assert float(whole.total) == pytest.approx(float(expected))


def test_packed_examples_count_their_own_positions() -> None:
    policy, reference, mask = a_batch()
    alone = constrained_token_loss(policy[:2, :9], reference[:2, :9], mask[:2, :9])
    packed = [part[:2, :9].reshape(1, 18) for part in (policy, reference, mask)]
    positions = response_positions(mask[:2, :9]).reshape(1, 18)
    assert float(constrained_token_loss(*packed, positions=positions).total) == pytest.approx(float(alone.total))
    assert float(constrained_token_loss(*packed).total) != pytest.approx(float(alone.total), rel=1e-3)


def turns_by_hand(row: list[int]) -> tuple[list[int], list[int]]:
    """Position in its turn and length of its turn for every token, by walking along the row."""
    positions, lengths = [-1] * len(row), [0] * len(row)
    start = 0
    while start < len(row):
        end = start
        while end < len(row) and row[end]:
            end += 1
        for place in range(start, end):
            positions[place], lengths[place] = place - start, end - start
        start = max(end, start + 1)
    return positions, lengths


def test_turns_by_hand() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0, 0, 0, 1], [0] * 9])
    positions = turn_positions(mask)
    assert positions[0].tolist() == [-1, 0, 1, -1, -1, 0, 1, 2, -1]
    assert positions[1].tolist() == [0, 1, -1, 0, -1, -1, -1, -1, 0]
    assert positions[2].tolist() == [-1] * 9
    assert turn_lengths(positions)[0].tolist() == [0, 2, 2, 0, 0, 3, 3, 3, 0]
    assert turn_lengths(positions)[1].tolist() == [2, 2, 0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_turns_are_those_of_a_walk_along_each_row(seed: int) -> None:
    """A turn that ends a row is none with one that begins the next."""
    mask = torch.rand(6, 23, generator=torch.Generator().manual_seed(seed)) < 0.6
    positions = turn_positions(mask)
    walked = [turns_by_hand(row) for row in mask.long().tolist()]
    assert positions.tolist() == [one for one, _ in walked]
    assert turn_lengths(positions).tolist() == [one for _, one in walked]


def test_a_row_of_one_response_has_one_turn() -> None:
    """Where `response_positions` is meant, the two agree."""
    _, _, mask = a_batch()
    assert bool((turn_positions(mask) == response_positions(mask))[mask].all())


def test_no_gradient_reaches_the_reference() -> None:
    policy, reference, mask = a_batch()
    policy.requires_grad_()
    reference.requires_grad_()
    constrained_token_loss(policy, reference, mask).total.backward()
    assert reference.grad is None


def test_low_precision_is_summed_in_float32() -> None:
    policy, reference, mask = a_batch(dtype=torch.bfloat16)
    found = constrained_token_loss(policy, reference, mask)
    assert found.total.dtype == torch.float32
    exact = constrained_token_loss(policy.double(), reference.double(), mask)
    assert float(found.total) == pytest.approx(float(exact.total), rel=1e-5)


def test_a_batch_without_a_response_is_zero() -> None:
    found = constrained_token_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert (float(found.total), int(found.count), float(found.mean)) == (0.0, 0, 0.0)


def test_mistakes_are_told() -> None:
    three = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"policy \(1, 3\), reference \(1, 2\)"):
        constrained_token_loss(three, three[:, :2], three)
    with pytest.raises(ValueError, match="weight_floor is 2"):
        constrained_token_loss(three, three, three, weight_floor=2.0)
    for settings in ({"first": 0.0}, {"early": -1.0}, {"rest": float("nan")}, {"num_early": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            TokenStrength(**settings)  # type: ignore[arg-type]
