"""Attention for rows that share a prefix: each prefix's keys and values are held once and read once a step.

A batch of attempts repeats few prompts many times. Cut apart, each row carries its own copy of the prefix, and reading
those copies is most of what a decoding step does. Here the queries of all rows of one prefix go through it together,
each row's own tokens apart, and the two are merged by their softmax sums (as in cascade and hydragen attention).

It stands in for `scaled_dot_product_attention` while a forward pass runs, so that any model that calls that function
on what its cache returned takes part. Whether one does, and gets the same logits, is found out by trying it
(`decoding.shares_attention`), never by the model's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deepalign.partial_attention import partial_attention

# Shape suffixes: P = prefixes, B = rows, R = most rows of one prefix, K = key heads, G = query heads of one key head,
# D = width of a head, S = columns of the prefixes, N = columns of the rows' own tokens, W = S + N in use.
_ROOM = 32
ALIGNED = 8
"""Columns of prefixes and of room for own tokens are multiples of it."""


def aligned(columns: int) -> int:
    """Columns that prefixes of so many are given; those behind them are masked out."""
    return -(-columns // ALIGNED) * ALIGNED


class NotShared(Exception):
    """A model used a shared cache in a way that is not understood here; the caller falls back to rows of their own."""


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: prefixes [P, K, S, D], and of each row its own tokens, [B, K, room, D]."""

    def __init__(self, prefix_keys: Tensor, prefix_values: Tensor, rows: _Rows, columns: int) -> None:
        super().__init__()
        more = columns - prefix_keys.shape[2]
        prefix_keys, prefix_values = pad(prefix_keys, (0, 0, 0, more)), pad(prefix_values, (0, 0, 0, more))
        self.keys: Tensor
        self.values: Tensor
        self.prefix_keys, self.prefix_values = prefix_keys.contiguous(), prefix_values.contiguous()
        self.used = 0
        self.is_initialized = True
        self.dtype, self.device = prefix_keys.dtype, prefix_keys.device
        self._rows = rows
        self.keys, self.values = (
            states.new_zeros(rows.count, states.shape[1], _ROOM, states.shape[3])
            for states in (prefix_keys, prefix_values)
        )

    def get_seq_length(self) -> int:
        """Columns that a row looks back on: those of the prefixes and of its own tokens."""
        return int(self.prefix_keys.shape[2]) + self.used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take one token's states, [B, K, 1, D]; what is returned means something to `SharedAttention` only."""
        if self._rows.column is not None:
            self.keys.index_copy_(2, self._rows.column, key_states)
            self.values.index_copy_(2, self._rows.column, value_states)
            self._rows.waiting[id(self.keys)] = self
            return self.keys, self.values
        if self.used == self.keys.shape[2]:
            self.keys, self.values = pad(self.keys, (0, 0, 0, _ROOM)), pad(self.values, (0, 0, 0, _ROOM))
        self.keys[:, :, self.used : self.used + 1] = key_states
        self.values[:, :, self.used : self.used + 1] = value_states
        self.used += 1
        self._rows.waiting[id(self.keys)] = self
        return self.keys, self.values

    def widen(self, room: int) -> None:
        """Have room for so many own tokens, and count all of it as in use: the mask says what is seen."""
        more = room - int(self.keys.shape[2])
        self.keys, self.values = pad(self.keys, (0, 0, 0, more)), pad(self.values, (0, 0, 0, more))
        self.used = room

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`; prefixes are dropped by `SharedCache.keep`."""
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]

    def keep_prefixes(self, indices: Tensor) -> None:
        """Keep only the prefixes at `indices`."""
        indices = indices.to(self.keys.device)
        self.prefix_keys, self.prefix_values = self.prefix_keys[indices], self.prefix_values[indices]


class _Rows:
    """Which prefix each row has, laid out so that the rows of one prefix stand side by side."""

    def __init__(self, sources: Sequence[int], device: torch.device) -> None:
        self.waiting: dict[int, SharedLayer] = {}
        """Layers whose keys went out and did not come to attention yet, by those keys' identity."""
        self.column: Tensor | None = None
        """Where the next token goes, on the device, [1]; None where layers count for themselves."""
        self._device = device
        self.arrange(sources)

    def arrange(self, sources: Sequence[int]) -> None:
        """Lay rows out anew; sources[i] is the prefix of row i."""
        self.sources = list(sources)
        self.count = len(self.sources)
        of_prefix: list[list[int]] = [[] for _ in range(max(self.sources) + 1)]
        for row, source in enumerate(self.sources):
            of_prefix[source].append(row)
        self.num_prefixes, self.most = len(of_prefix), max(len(rows) for rows in of_prefix)
        # Where a prefix has fewer rows than another, its last one is repeated; the repeats are read by nobody.
        laid = [row for rows in of_prefix for row in rows + rows[-1:] * (self.most - len(rows))]
        place = [0] * self.count
        for prefix, rows in enumerate(of_prefix):
            for number, row in enumerate(rows):
                place[row] = prefix * self.most + number
        self._plain = laid == list(range(self.count))
        self._laid = torch.tensor(laid, device=self._device)
        self._place = torch.tensor(place, device=self._device)

    def side_by_side(self, values_B: Tensor) -> Tensor:
        """[B, ...] to [P, R, ...]."""
        laid = values_B if self._plain else values_B[self._laid.to(values_B.device)]
        return laid.view(self.num_prefixes, self.most, *values_B.shape[1:])

    def back(self, values_PR: Tensor) -> Tensor:
        """[P, R, ...] to [B, ...]."""
        flat = values_PR.flatten(0, 1)
        return flat if self._plain else flat[self._place.to(flat.device)]


class SharedCache(DynamicCache):  # type: ignore[misc]
    """A cache of `SharedLayer`s, made of a finished pass over the prefixes."""

    def __init__(self, prefixes: DynamicCache, sources: Sequence[int], columns: int | None = None) -> None:
        """Share.

        Args:
            prefixes: Left-padded cache of the pass over the prefixes, one row each.
            sources: For each row, which prefix it begins with; every prefix has at least one.
            columns: How many to have for prefixes; those behind the pass's own are for the mask to hide.
        """
        super().__init__()
        first = prefixes.layers[0]
        self.rows = _Rows(sources, first.keys.device)
        self.layers = [
            SharedLayer(layer.keys, layer.values, self.rows, columns or layer.keys.shape[2])
            for layer in prefixes.layers
        ]

    def fix(self, room: int, column: Tensor) -> None:
        """Keep every shape as it is from now on: room for so many own tokens, and the next one's place in a tensor."""
        self.rows.column = column
        for layer in self.layers:
            layer.widen(room)

    def keep(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`, and the prefixes that any of them has."""
        sources = [self.rows.sources[row] for row in indices.tolist()]
        if not sources:
            return
        left = sorted(set(sources))
        for layer in self.layers:
            layer.batch_select_indices(indices)
        if len(left) < self.rows.num_prefixes:
            prefixes = torch.tensor(left, device=indices.device)
            for layer in self.layers:
                layer.keep_prefixes(prefixes)
        self.rows.arrange([left.index(source) for source in sources])


class SharedAttention(TorchFunctionMode):
    """While entered, for one forward pass, attention over a `SharedCache`'s keys looks at prefixes and own tokens."""

    def __init__(self, cache: SharedCache) -> None:
        super().__init__()
        self._rows = cache.rows
        self._known: dict[int, SharedLayer] = {}
        self._masks: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor, Tensor]] = {}

    def __enter__(self) -> SharedAttention:
        self._rows.waiting.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and self._rows.waiting:
            raise NotShared("keys went out of the cache and did not come to attention")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            layer = self._layer(*args, **(kwargs or {}))
            if layer is not None:
                return self._attend(layer, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _layer(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> SharedLayer | None:
        layer = self._rows.waiting.pop(id(key), None)
        if layer is not None:
            self._known[id(key)] = layer
        # Some models let several layers look at one layer's keys.
        return layer or self._known.get(id(key))

    def _attend(
        self,
        layer: SharedLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of one new token in each row: [B, heads, 1, D], or with the heads of one key side by side."""
        rows, key_heads, width = self._rows, key.shape[1], query.shape[-1]
        if value is not layer.values or dropout_p or is_causal or query.shape[0] != rows.count:
            raise NotShared("attention over a shared cache with dropout, causality or other values")
        if query.shape[2] != 1 and query.shape[1] != key_heads:
            raise NotShared("more than one new token in a row")
        query_BKGD = query.reshape(rows.count, key_heads, -1, width)
        prefix_mask, own_mask = self._split(attn_mask, layer)
        scale = 1.0 / math.sqrt(width) if scale is None else scale
        # Prefixes: the queries of all their rows at once, [P, K, R * G, .].
        query_PKQD = rows.side_by_side(query_BKGD).transpose(1, 2).flatten(2, 3)
        mask_PKQS = prefix_mask.repeat_interleave(query_BKGD.shape[2], dim=2).expand(-1, key_heads, -1, -1)
        both_PKQ = partial_attention(query_PKQD, layer.prefix_keys, layer.prefix_values, mask_PKQS, scale)
        shape = (rows.num_prefixes, key_heads, rows.most, query_BKGD.shape[2], -1)
        out_BKGD, norm_BKG1 = (rows.back(part.view(shape).transpose(1, 2)) for part in both_PKQ)
        own_BKGD, own_norm_BKG1 = partial_attention(query_BKGD, layer.keys, layer.values, own_mask, scale)
        merged_BKGD = torch.lerp(own_BKGD, out_BKGD, (norm_BKG1 - own_norm_BKG1).sigmoid())
        return merged_BKGD.to(query.dtype).reshape(*query.shape[:-1], value.shape[-1])

    def _split(self, mask: Tensor | None, layer: SharedLayer) -> tuple[Tensor, Tensor]:
        """A step's mask as two to be added: for the prefixes, [P, 1, R, S], and for own tokens, [B, 1, 1, room]."""
        known = self._masks.get((id(mask), layer.keys.device))
        if known is not None:
            return known[1:]
        given = mask
        rows, dtype = self._rows, layer.keys.dtype
        columns = layer.get_seq_length()
        if mask is None:
            mask = torch.ones(rows.count, 1, 1, columns, dtype=torch.bool, device=layer.keys.device)
        if mask.shape[1:] != (1, 1, columns):
            raise NotShared(f"a mask of shape {tuple(mask.shape)}")
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        else:
            # A prefix hidden as a whole with -inf would have no normaliser.
            added = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
        added = added.expand(rows.count, 1, 1, columns)
        prefix_columns = columns - layer.used
        prefix = rows.side_by_side(added[..., :prefix_columns]).squeeze(3).transpose(1, 2)
        spare = int(layer.keys.shape[2]) - layer.used
        own = pad(added[..., prefix_columns:], (0, spare), value=torch.finfo(dtype).min)
        # The mask is kept with what was made of it, so that its identity stays its own.
        self._masks[id(given), layer.keys.device] = (given, prefix, own)
        return prefix, own
