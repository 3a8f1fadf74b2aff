"""What a token's log-probability weighs in the loss, and what comes of it: the shared language of head and trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from deepalign.losses import TokenStrength, constrained_token_loss

# Shape suffixes: B = sequences, T = predicted positions, N = response positions.
IGNORED = -100
"""Label of a token without loss."""


@dataclass(kw_only=True)
class Objective:
    """What each response token's log-probability weighs in the loss; tensors are [B, T], T one less than the ids."""

    strength: TokenStrength | None = None
    """Of the constraint; None is plain cross-entropy."""
    reference_BT: Tensor | None = None
    """Log-probabilities under the reference model, for the constraint."""
    positions_BT: Tensor | None = None
    """0-based response positions, for the constraint."""
    weight_floor: float = 0.0
    scale_BT: Tensor | None = None
    """A further factor of each token; 1 by default."""

    def at(self, mask_BT: Tensor, dtype: torch.dtype) -> Weigh:
        """The same for the masked tokens in a row, [N]."""
        scale_N = None if self.scale_BT is None else self.scale_BT[mask_BT].to(dtype)
        if self.strength is None:
            return Weigh(scale_N=scale_N)
        if self.reference_BT is None or self.positions_BT is None:
            raise ValueError("the constraint needs reference log-probabilities and response positions")
        return Weigh(
            beta_N=self.strength.at(self.positions_BT[mask_BT], dtype),
            reference_N=self.reference_BT[mask_BT].to(dtype),
            weight_floor=self.weight_floor,
            scale_N=scale_N,
        )


@dataclass(kw_only=True)
class Weigh:
    """Weighs log-probabilities of response tokens, [N] in all or a slice of them."""

    beta_N: Tensor | None = None
    reference_N: Tensor | None = None
    weight_floor: float = 0.0
    scale_N: Tensor | None = None

    def __call__(self, logps: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The constraint's weight (Eq. 5), and the loss' whole factor."""
        if self.beta_N is None or self.reference_N is None:
            weights = torch.ones_like(logps)
        else:
            weights = 2.0 * torch.sigmoid(self.beta_N[rows] * (self.reference_N[rows] - logps))
            if self.weight_floor > 0.0:
                weights = weights.clamp(min=self.weight_floor)
        return weights, weights if self.scale_N is None else weights * self.scale_N[rows]


@dataclass
class HeadOutput(ModelOutput):  # type: ignore[misc]
    """Per-token results, each [B, T] and 0 off the responses; the names are those of TRL's own fused head."""

    log_probs: Tensor | None = None
    """Weighted log-probabilities, with gradient: minus their sum is the loss."""
    logps: Tensor | None = None
    """Log-probabilities as they are, no gradient."""
    weights: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def weighted(output: Any, objective: Objective) -> HeadOutput:
    """The output of TRL's fused head with its log-probabilities weighted."""
    mask_BT, logps_BT = output.label_mask, output.log_probs.detach()
    weights_N, factor_N = objective.at(mask_BT, logps_BT.dtype)(logps_BT[mask_BT], slice(None))
    weights_BT, factor_BT = (
        torch.zeros_like(logps_BT).masked_scatter(mask_BT, found) for found in (weights_N, factor_N)
    )
    return HeadOutput(
        log_probs=output.log_probs * factor_BT,
        logps=logps_BT,
        weights=weights_BT,
        entropy=output.entropy,
        is_top1=output.is_top1,
        label_mask=mask_BT,
        aux_loss=output.aux_loss,
    )


def constraint_sums(output: HeadOutput, objective: Objective, num_early: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What is worth logging of a batch, as sums over tokens and their number.

    Returns:
        "objective": Eq. 3 in nats; "log_ratio": log(pi / pi_ref) in nats; "weight_first", "weight_early" and
        "weight_rest": Eq. 5's weight by response position.
    """
    mask_BT, positions_BT, reference_BT = output.label_mask, objective.positions_BT, objective.reference_BT
    logps_BT, weights_BT = output.logps, output.weights
    if mask_BT is None or positions_BT is None or reference_BT is None or logps_BT is None or weights_BT is None:
        raise ValueError("there is no constraint to tell of")
    exact = constrained_token_loss(
        logps_BT,
        reference_BT,
        mask_BT,
        objective.strength,
        positions=positions_BT,
        weight_floor=objective.weight_floor,
    )
    spans = {
        "weight_first": positions_BT == 0,
        "weight_early": (positions_BT > 0) & (positions_BT < num_early),
        "weight_rest": positions_BT >= max(1, num_early),
    }
    ratio_BT = torch.where(mask_BT, logps_BT - reference_BT, 0.0)
    sums = {"objective": (exact.total, exact.count), "log_ratio": (ratio_BT.sum(), exact.count)}
    for name, span_BT in spans.items():
        sums[name] = weights_BT[span_BT & mask_BT].sum(), (span_BT & mask_BT).sum()
    return sums


class Means:
    """Means over all tokens since they were last taken, however these came in batches."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, float]] = {}

    def add(self, names: Iterable[str], sums: Iterable[tuple[float, float]]) -> None:
        """Add sums, each with the number of tokens that it is over."""
        for name, (total, count) in zip(names, sums, strict=True):
            before = self._held.get(name, (0.0, 0.0))
            self._held[name] = before[0] + total, before[1] + count

    def take(self) -> dict[str, float]:
        """The means, of what has any token; begins anew."""
        held, self._held = self._held, {}
        return {name: total / count for name, (total, count) in held.items() if count}
