"""Drawing the next token: temperature, then top-k, then top-p, then one uniform number by the inverse of the CDF.

The order and the meaning of the filters are those of `transformers` (its `generate` is the oracle in the tests). With
a top-k filter the top-p filter works on the k survivors, which gives the same set without sorting the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepalign.records import Sampling

_FEW = 1024
"""Tokens that top-k may keep for a row to be drawn together with others."""


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms_B: Tensor) -> Tensor:
    """Next token id of each row, [B].

    Args:
        logits_BV: Raw logits, [B, V], float32.
        samplings: One setting per row.
        uniforms_B: One number in [0, 1) per row.
    """
    width = logits_BV.shape[-1]
    kept = [min(own.top_k, width) if own.top_k > 0 else width for own in samplings]
    sampled = [row for row, own in enumerate(samplings) if not own.greedy]
    tokens_B = logits_BV.argmax(dim=-1)
    # Rows that keep few tokens go together, whatever their settings; those that keep all of them would make them wide.
    for group in ([row for row in sampled if kept[row] <= _FEW], [row for row in sampled if kept[row] > _FEW]):
        if group:
            settings_B3 = torch.tensor(
                [(samplings[row].temperature, samplings[row].top_p, kept[row]) for row in group],
                dtype=torch.float64,
                device=logits_BV.device,
            )
            most = max(kept[row] for row in group)
            if len(group) == len(samplings):
                return _draw_together(logits_BV, settings_B3, most, uniforms_B)
            rows = torch.tensor(group, device=logits_BV.device)
            tokens_B[rows] = _draw_together(logits_BV[rows], settings_B3, most, uniforms_B[rows])
    return tokens_B


def _draw_together(logits_BV: Tensor, settings_B3: Tensor, most: int, uniforms_B: Tensor) -> Tensor:
    """Draw rows with settings of their own: temperature, top-p, and how many tokens top-k keeps, at most `most`."""
    temperature_B1, top_p_B1, kept_B1 = settings_B3.unsqueeze(1).unbind(dim=-1)
    top_BK, ids_BK = torch.topk(logits_BV, most, dim=-1)
    # In double precision, so that a uniform number close to 1 still falls inside the last survivor; measured from the
    # highest, so that no temperature is too small to divide by.
    scores_BK = (top_BK.double() - top_BK[:, :1].double()) / temperature_B1
    rank_K = torch.arange(most, device=logits_BV.device)
    probs_BK = torch.softmax(scores_BK.masked_fill(rank_K >= kept_B1, -math.inf), dim=-1)
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    # A token survives top-p while the mass before it is below p; the first always survives.
    survives_BK = (before_BK < top_p_B1) & (rank_K < kept_B1)
    survives_BK[:, 0] = True
    probs_BK = probs_BK * survives_BK
    cdf_BK = probs_BK.cumsum(dim=-1)
    target_B1 = (uniforms_B.double() * cdf_BK[:, -1]).unsqueeze(-1)
    chosen_B1 = torch.searchsorted(cdf_BK, target_B1, right=True)
    last_B1 = survives_BK.sum(dim=-1, keepdim=True) - 1
    return ids_BK.gather(-1, torch.minimum(chosen_B1, last_B1)).squeeze(-1)
