"""Attention over a part of the keys, with the normaliser by which parts are merged."""

from __future__ import annotations

import torch
from torch import Tensor

_FUSED_QUERIES = 6

# Shape suffixes as in `sharing.py`; A = prefixes or rows, Q = queries of one head, T = keys.


def _fused_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by the kernel that `scaled_dot_product_attention` takes when there is a mask; it tells the normaliser.

    The last dimension of keys and mask is a multiple of `ALIGNED`, which the kernel asks for.
    """
    added = mask.expand(*query.shape[:3], keys.shape[2])
    out, norm, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, added, True, 0.0, False, scale=scale
    )
    return out.float(), norm[:, :, : query.shape[2], None].float()


def partial_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, with what is needed to merge it with that over others.

    Args:
        query: [A, K, Q, D].
        keys: [A, K, T, D].
        values: [A, K, T, D].
        mask: What is added to the scores; [A, K, Q, T] or what expands to it.
        scale: Of the scores.

    Returns:
        Output [A, K, Q, D] and logarithm of the softmax's normaliser [A, K, Q, 1], both float32.
    """
    size, heads, num_queries, _ = query.shape
    # With one query of a head the fused kernel leaves most of its tile empty (H100: 641 us against 343 with 640 rows).
    if query.is_cuda and num_queries >= _FUSED_QUERIES:
        return _fused_attention(query, keys, values, mask, scale)
    added = mask.expand(size, heads, num_queries, keys.shape[2]).flatten(0, 1)
    scores = torch.baddbmm(added, query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    out = torch.bmm(weights.to(values.dtype), values.flatten(0, 1)).float()
    # log of the normaliser = highest score - log of its weight; cheaper than a second pass of exponentials.
    norm = scores.amax(dim=-1, keepdim=True).float() - weights.amax(dim=-1, keepdim=True).log()
    return out.view(size, heads, num_queries, -1), norm.view(size, heads, num_queries, 1)
