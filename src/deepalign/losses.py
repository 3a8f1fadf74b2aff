"""The token-wise constrained objective of the paper (Eq. 3): fine-tuning that holds each token to where it started.

A pure function of log-probabilities: knows nothing of models, trainers or devices. Where the tuned model still gives a
token its old probability the gradient is that of plain cross-entropy; the further it has moved, the less is pushed,
and the strength says how soon, by response position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Shape suffixes: B = sequences, T = positions.
Reduction = Literal["token", "sequence_sum", "sequence_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStrength:
    """The constraint's strength (beta) by response position; the defaults are the paper's (section 4.1).

    Raises:
        ValueError: A strength is not a positive number, or the number of early tokens is negative.
    """

    first: float = 0.5
    """Of the first response token."""
    early: float = 2.0
    """Of the second to the `num_early`-th."""
    rest: float = 0.1
    """Of all after them."""
    num_early: int = 5
    """Response tokens that are not `rest`, the first one included; 0 makes all of them `rest`."""

    def __post_init__(self) -> None:
        for name in ("first", "early", "rest"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; a strength is a positive number (plain fine-tuning is near 0)")
        if self.num_early < 0:
            raise ValueError(f"num_early is {self.num_early}; give 0 or more tokens")

    @classmethod
    def uniform(cls, beta: float) -> TokenStrength:
        """The same strength at every position (the ablation of Table 8)."""
        return cls(first=beta, early=beta, rest=beta)

    def at(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Strength at response positions, 0-based, any shape; of that shape."""
        first, early, rest = torch.tensor([self.first, self.early, self.rest], dtype=dtype, device=positions.device)
        return torch.where(positions < self.num_early, torch.where(positions == 0, first, early), rest)


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A sum and what to divide it by, so that ranks and accumulation steps can add both before they divide."""

    total: Tensor
    """Scalar, with gradient."""
    count: Tensor
    """Scalar, no gradient: response tokens, or sequences that have any."""
    weights_BT: Tensor
    """Share of the plain cross-entropy's gradient that each token keeps (Eq. 5), in (0, 2); 0 off the response."""

    @property
    def mean(self) -> Tensor:
        """Total over count; 0 without any."""
        return self.total / self.count.clamp(min=1)


def response_positions(response_mask: Tensor) -> Tensor:
    """0-based position of each token among the response tokens of its row, [B, T]; -1 before the first.

    Padding may stand on either side. Rows that hold several responses need `turn_positions`.
    """
    return response_mask.long().cumsum(dim=-1) - 1


def turn_positions(response_mask: Tensor) -> Tensor:
    """0-based position of each token among the response tokens of its own turn, [B, T]; -1 off the responses.

    A turn is an unbroken run of response tokens: so positions begin again with each answer of a conversation, and with
    each example of a packed row, whose first token is never one of its response.
    """
    mask_BT = response_mask.bool()
    before_BT = torch.nn.functional.pad(mask_BT, (1, 0))[..., :-1]
    count_BT = mask_BT.long().cumsum(dim=-1) - 1
    start_BT = torch.where(mask_BT & ~before_BT, count_BT, 0).cummax(dim=-1).values
    return torch.where(mask_BT, count_BT - start_BT, -1)


def turn_lengths(positions: Tensor) -> Tensor:
    """Response tokens of the turn that each response token belongs to, [B, T]; 0 off the responses.

    Args:
        positions: From `turn_positions`.
    """
    inside_BT = positions >= 0
    # Every turn of the batch gets a number; its length is how often that number stands.
    turn_BT = (positions == 0).flatten().long().cumsum(dim=0).view_as(positions) * inside_BT
    sizes = torch.bincount(turn_BT.flatten(), minlength=1)
    return torch.where(inside_BT, sizes[turn_BT], 0)


def constrained_token_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    response_mask: Tensor,
    strength: TokenStrength | None = None,
    *,
    positions: Tensor | None = None,
    weight_floor: float = 0.0,
    reduction: Reduction = "token",
) -> TokenLoss:
    """Sum over response tokens of (2 / beta_t) softplus(beta_t (log pi_ref - log pi)), the paper's Eq. 3.

    Its gradient is that of cross-entropy with each token weighted by 2 sigmoid(beta_t (log pi_ref - log pi)) (Eq. 5):
    1 where nothing has moved, 1/2 where the token has become 3^(1 / beta_t) times as likely.

    Args:
        policy_logps: Log-probability of each token under the model that is tuned, [B, T], nats.
        reference_logps: The same under the model that it started from; no gradient flows into it.
        response_mask: True at response tokens, [B, T]; what stands elsewhere is ignored, even if it is no number.
        strength: Beta by response position; None is the paper's.
        positions: 0-based response position of each token, [B, T], for packed rows; by default counted along the row.
        weight_floor: Least weight of a token. 0 is Eq. 3; 1e-3 is what the official code does.
        reduction: What is counted: tokens (every token alike), sequences with their sums, or with their means.

    Raises:
        ValueError: Shapes differ, or the floor is not in [0, 2).
    """
    if not policy_logps.shape == reference_logps.shape == response_mask.shape:
        shapes = [tuple(part.shape) for part in (policy_logps, reference_logps, response_mask)]
        raise ValueError(f"shapes differ: policy {shapes[0]}, reference {shapes[1]}, mask {shapes[2]}")
    if not 0.0 <= weight_floor < 2.0:
        raise ValueError(f"weight_floor is {weight_floor}; weights lie in (0, 2)")
    mask_BT = response_mask.bool()
    # Low precision would round away what the weights are made of; the mask comes first, for 0 * nan is nan.
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    gap_BT = torch.where(mask_BT, reference_logps.detach().to(dtype), 0.0) - torch.where(
        mask_BT, policy_logps.to(dtype), 0.0
    )
    where_BT = response_positions(mask_BT) if positions is None else positions
    beta_BT = (strength or TokenStrength()).at(where_BT, dtype)
    loss_BT = 2.0 / beta_BT * softplus(beta_BT * gap_BT)
    weights_BT = 2.0 * torch.sigmoid(beta_BT * gap_BT.detach())
    if weight_floor > 0.0:
        # Where the weight would be less, the loss goes on along its tangent.
        edge_BT = math.log(weight_floor / (2.0 - weight_floor)) / beta_BT
        tangent_BT = 2.0 / beta_BT * softplus(beta_BT * edge_BT) + weight_floor * (gap_BT - edge_BT)
        loss_BT = torch.where(gap_BT < edge_BT, tangent_BT, loss_BT)
        weights_BT = weights_BT.clamp(min=weight_floor)
    loss_BT = torch.where(mask_BT, loss_BT, 0.0)
    weights_BT = torch.where(mask_BT, weights_BT, 0.0)
    num_B = mask_BT.sum(dim=-1)
    if reduction == "token":
        return TokenLoss(loss_BT.sum(), num_B.sum(), weights_BT)
    sums_B = loss_BT.sum(dim=-1)
    per_sequence_B = sums_B / num_B.clamp(min=1) if reduction == "sequence_mean" else sums_B
    return TokenLoss(per_sequence_B.sum(), (num_B > 0).sum(), weights_BT)
