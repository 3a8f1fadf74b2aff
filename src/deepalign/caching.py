"""Key-value caches for generation: buffers written in place, and rows cut out of a shared pass.

`transformers` grows its cache by concatenation, which copies every key and value at every step; `GrowingLayer` writes
into spare room instead. Works through the public `Cache` protocol, so any architecture that uses `DynamicLayer` gains,
and any other (sliding windows that fill up, recurrent states) falls back to the library's own layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` whose keys and values, [B, H, T, D], are views of larger buffers."""

    def __init__(self, room: int = 64) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self._room = room
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states, [B, H, t, D]; returns all keys and values so far."""
        used = self.get_seq_length()
        total = used + key_states.shape[-2]
        if self._key_buffer is None or self._value_buffer is None or total > self._key_buffer.shape[-2]:
            self._key_buffer = self._enlarged(self.keys if used else None, key_states, total)
            self._value_buffer = self._enlarged(self.values if used else None, value_states, total)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._key_buffer[:, :, used:total] = key_states
        self._value_buffer[:, :, used:total] = value_states
        self.keys, self.values = self._key_buffer[:, :, :total], self._value_buffer[:, :, :total]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        if self._key_buffer is None or self._value_buffer is None:
            return
        used = self.get_seq_length()
        indices = indices.to(self._key_buffer.device)
        self._key_buffer, self._value_buffer = self._key_buffer[indices], self._value_buffer[indices]
        self.keys, self.values = self._key_buffer[:, :, :used], self._value_buffer[:, :, :used]

    def _enlarged(self, old: Tensor | None, like: Tensor, total: int) -> Tensor:
        batch, heads, _, width = like.shape
        buffer = like.new_zeros(batch, heads, total + self._room, width)
        if old is not None:
            buffer[:, :, : old.shape[-2]] = old
        return buffer


def empty_cache(config: Any, room: int = 64) -> DynamicCache:
    """A cache for a model's configuration, with `GrowingLayer` wherever a plain `DynamicLayer` would be."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_share_prefixes(config: Any, total_length: int) -> bool:
    """Whether rows can be cut out of a shared pass: every layer keeps every position up to `total_length`."""
    layers = DynamicCache(config=config).layers
    return len(layers) > 0 and all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and total_length < layer.sliding_window)
        for layer in layers
    )


def is_filled(cache: DynamicCache) -> bool:
    """Whether a forward pass has left a state in every layer; a model may keep some of its states elsewhere."""
    return all(
        any(layer.has_previous_state.values())
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        else isinstance(layer, DummyLayer) or layer.keys is not None
        for layer in cache.layers
    )


def takes_batches(config: Any) -> bool:
    """Whether rows may be padded, and taken out when they end; never promised for kinds of layer unknown here."""
    known = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return all(
        type(layer) in known or isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in DynamicCache(config=config).layers
    )


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep only the rows at `rows`, in every layer."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            # `batch_select_indices` knows nothing of recurrent states; reordering does, and may name fewer rows.
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)


def row_cache(
    config: Any, shared: DynamicCache, sources: list[int], starts: list[int], lengths: list[int], room: int
) -> DynamicCache:
    """Cut rows out of a shared pass: row i takes `lengths[i]` positions of `sources[i]` from column `starts[i]` on.

    Rows come out right-aligned. Exact, since positions are encoded before keys are cached and a decoder's states do
    not depend on what comes after.
    """
    cache = empty_cache(config, room)
    width = max(lengths)
    if width == 0:
        return cache
    for old, new in zip(shared.layers, cache.layers, strict=True):
        if old.keys is None or not old.is_initialized:
            continue
        new.update(_cut(old.keys, sources, starts, lengths, width), _cut(old.values, sources, starts, lengths, width))
    return cache


def _cut(states: Tensor, sources: list[int], starts: list[int], lengths: list[int], width: int) -> Tensor:
    _, heads, _, size = states.shape
    rows = torch.zeros(len(sources), heads, width, size, dtype=states.dtype, device=states.device)
    for row, (source, start, length) in enumerate(zip(sources, starts, lengths, strict=True)):
        rows[row, :, width - length :] = states[source, :, start : start + length]
    return rows
