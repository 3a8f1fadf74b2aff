"""Weights by hand, what is logged of them, and the parts of TRL's own output layer that they stand on."""

from __future__ import annotations

from typing import Any

import by_hand
import pytest
import torch
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from deepalign.losses import TokenStrength, turn_positions
from deepalign.training.objective import HeadOutput, Objective, constraint_sums, weighted

MASK = torch.tensor([[False, True, True, False, True, True, True], [True] * 7])
POLICY = torch.where(MASK, -torch.linspace(0.5, 4.0, 14).view(2, 7), 0.0)
REFERENCE = torch.where(MASK, -torch.linspace(2.0, 2.5, 14).flip(0).view(2, 7), 0.0)
STRENGTH = TokenStrength(num_early=3)


def of_trl(logps: torch.Tensor) -> FusedCausalLMOutput:
    return FusedCausalLMOutput(log_probs=logps, entropy=logps, is_top1=logps, label_mask=MASK)


def constraint(**changes: Any) -> Objective:
    return Objective(strength=STRENGTH, reference_BT=REFERENCE, positions_BT=turn_positions(MASK), **changes)


def weights_by_hand(floor: float = 0.0) -> dict[tuple[int, int], tuple[int, float]]:
    """Position and weight of each response token."""
    found = {}
    for row in range(2):
        tokens = {"labels": [-100, *[1 if inside else -100 for inside in MASK[row].tolist()]], "input_ids": []}
        for place, position in by_hand.responses(tokens):
            beta = by_hand.beta(position, num_early=3)
            weight = by_hand.weight(float(POLICY[row, place]), float(REFERENCE[row, place]), beta)
            found[row, place] = position, max(floor, weight)
    return found


@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_trls_log_probs_are_weighted_by_equation_5(floor: float) -> None:
    logps = POLICY.clone().requires_grad_()
    scale = torch.linspace(0.5, 2.0, 14).view(2, 7)
    found = weighted(of_trl(logps), constraint(weight_floor=floor, scale_BT=scale))
    assert found.log_probs is not None
    assert found.weights is not None
    (grad,) = torch.autograd.grad(found.log_probs.sum(), logps)
    expected = weights_by_hand(floor)
    for place in [(row, column) for row in range(2) for column in range(7)]:
        _, weight = expected.get(place, (0, 0.0))
        assert float(found.weights[place]) == pytest.approx(weight, rel=1e-5)
        assert float(grad[place]) == pytest.approx(weight * float(scale[place]), rel=1e-5)


def test_without_a_strength_each_token_weighs_the_same() -> None:
    found = weighted(of_trl(POLICY), Objective())
    assert found.weights is not None
    assert found.log_probs is not None
    assert torch.equal(found.weights, MASK.float())
    assert torch.equal(found.log_probs, POLICY)


def test_a_constraint_without_its_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        weighted(of_trl(POLICY), Objective(strength=STRENGTH))
    with pytest.raises(ValueError, match="no constraint"):
        constraint_sums(HeadOutput(), constraint(), 3)


def test_what_is_logged_is_sums_over_tokens() -> None:
    sums = constraint_sums(weighted(of_trl(POLICY), constraint()), constraint(), 3)
    expected = weights_by_hand()
    spans = {"weight_first": range(1), "weight_early": range(1, 3), "weight_rest": range(3, 99)}
    for name, span in spans.items():
        weights = [weight for position, weight in expected.values() if position in span]
        assert float(sums[name][0]) == pytest.approx(sum(weights), rel=1e-5)
        assert int(sums[name][1]) == len(weights) > 0
    assert float(sums["log_ratio"][0]) == pytest.approx(float((POLICY - REFERENCE).sum()), rel=1e-5)
    assert int(sums["log_ratio"][1]) == int(sums["objective"][1]) == 12


def test_eq3_itself_is_logged(tiny_llama: Any, make_rows: Any) -> None:
    policy, start, (row,) = tiny_llama(0), tiny_llama(1), make_rows(1, answer=(9, 12))
    logps, reference = (by_hand.log_probs(model, row).detach().unsqueeze(0) for model in (policy, start))
    mask = torch.tensor([row["labels"]])[:, 1:] != -100
    objective = Objective(strength=TokenStrength(), reference_BT=reference, positions_BT=turn_positions(mask))
    output = FusedCausalLMOutput(log_probs=torch.where(mask, logps, 0.0), label_mask=mask)
    total, count = constraint_sums(weighted(output, objective), objective, 5)["objective"]
    assert float(total / count) == pytest.approx(float(by_hand.eq3_loss(policy, start, [row]).detach()), rel=1e-5)


@pytest.mark.parametrize("with_graph", [False, True])
def test_trls_fused_head_still_means_what_is_relied_on(with_graph: bool, tiny_llama: Any, make_rows: Any) -> None:
    """[B, T - 1] log-probabilities of the next labels, 0 where they are ignored; the rest is called as here."""
    model, rows = tiny_llama(), make_rows(2, answer=(6, 6), prompt=(3, 3))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.set_grad_enabled(with_graph):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert isinstance(found, FusedCausalLMOutput)
    assert found.log_probs.shape == found.label_mask.shape == found.entropy.shape == found.is_top1.shape == (2, 8)
    assert torch.equal(found.label_mask, labels[:, 1:] != -100)
    assert found.log_probs.requires_grad is with_graph
    for row, logps in zip(rows, found.log_probs.detach(), strict=True):
        expected = by_hand.log_probs(model, row).detach()
        expected[:2] = 0.0
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)
        assert logps[:2].tolist() == [0.0, 0.0]
