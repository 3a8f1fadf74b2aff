"""Drawing the next token: temperature, then top-k, then top-p, then one uniform number by the inverse of the CDF.

The order and the meaning of the filters are those of `transformers` (its `generate` is the oracle in the tests). With
a top-k filter the top-p filter works on the k survivors, which gives the same set without sorting the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepalign.records import Sampling


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms_B: Tensor) -> Tensor:
    """Next token id of each row, [B].

    Args:
        logits_BV: Raw logits, [B, V], float32.
        samplings: One setting per row.
        uniforms_B: One number in [0, 1) per row.
    """
    tokens_B = logits_BV.argmax(dim=-1)
    for setting in dict.fromkeys(samplings):
        if setting.greedy:
            continue
        rows = torch.tensor([i for i, own in enumerate(samplings) if own == setting], device=logits_BV.device)
        tokens_B[rows] = _draw_alike(logits_BV[rows], setting, uniforms_B[rows])
    return tokens_B


def _draw_alike(logits_BV: Tensor, setting: Sampling, uniforms_B: Tensor) -> Tensor:
    num_kept = min(setting.top_k, logits_BV.shape[-1]) if setting.top_k > 0 else logits_BV.shape[-1]
    top_BK, ids_BK = torch.topk(logits_BV, num_kept, dim=-1)
    # In double precision, so that a uniform number close to 1 still falls inside the last survivor; measured from the
    # highest, so that no temperature is too small to divide by.
    probs_BK = torch.softmax((top_BK.double() - top_BK[:, :1].double()) / setting.temperature, dim=-1)
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    # A token survives top-p while the mass before it is below p; the first always survives.
    survives_BK = before_BK < setting.top_p
    survives_BK[:, 0] = True
    probs_BK = probs_BK * survives_BK
    cdf_BK = probs_BK.cumsum(dim=-1)
    target_B1 = (uniforms_B.double() * cdf_BK[:, -1]).unsqueeze(-1)
    chosen_B1 = torch.searchsorted(cdf_BK, target_B1, right=True).clamp(max=num_kept - 1)
    last_B1 = survives_BK.sum(dim=-1, keepdim=True) - 1
    return ids_BK.gather(-1, torch.minimum(chosen_B1, last_B1)).squeeze(-1)
