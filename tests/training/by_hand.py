"""Slow twins: what the trainer computes, from full logits and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, list[int]]


def log_probs(model: Any, row: Row) -> Tensor:
    """Log-probability of every id but the first, from the model's own full logits; one row, no padding."""
    ids = torch.tensor([row["input_ids"]])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.stack([torch.log_softmax(logits[place], dim=-1)[ids[0, place + 1]] for place in range(len(logits))])


def responses(row: Row) -> list[tuple[int, int]]:
    """Place among the predicted ids, and position in its turn, of each token that carries loss."""
    found, position = [], 0
    for place, label in enumerate(row["labels"][1:]):
        position = position + 1 if label != -100 else 0
        if label != -100:
            found.append((place, position - 1))
    return found


def turns(row: Row) -> list[list[int]]:
    """Places of each answer's tokens."""
    out: list[list[int]] = []
    for place, position in responses(row):
        if position == 0:
            out.append([])
        out[-1].append(place)
    return out


def num_tokens(rows: Iterable[Row]) -> int:
    return sum(len(responses(row)) for row in rows)


def beta(position: int, betas: Sequence[float] = (0.5, 2.0, 0.1), num_early: int = 5) -> float:
    """Eq. 3's strength by response position."""
    return betas[2] if position >= num_early else betas[0 if position == 0 else 1]


def weight(policy: float, reference: float, strength: float) -> float:
    """Eq. 5's."""
    return 2.0 / (1.0 + math.exp(strength * (policy - reference)))


def eq3_loss(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """Mean over all response tokens of -(2 / beta) log sigmoid(beta log(pi / pi_ref)), with the policy's gradient."""
    terms = []
    for row in rows:
        with torch.no_grad():
            start = log_probs(reference, row)
        now = log_probs(policy, row)
        for place, position in responses(row):
            strength = beta(position)
            terms.append(-2.0 / strength * torch.nn.functional.logsigmoid(strength * (now[place] - start[place])))
    return torch.stack(terms).mean()
