"""Caches: the growing layer against the library's own, rows cut from a shared pass against passes of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from deepalign.caching import (
    GrowingLayer,
    can_share_prefixes,
    empty_cache,
    is_filled,
    keep_rows,
    row_cache,
    takes_batches,
)

LOCAL_AND_FULL = ["sliding_attention", "full_attention"]


def config(model_type: str, **settings: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **{**sizes, **settings})


@pytest.mark.parametrize("room", [0, 1, 64])
@pytest.mark.parametrize("seed", range(5))
def test_a_growing_layer_holds_what_the_librarys_layer_holds(room: int, seed: int) -> None:
    """Any sequence of appending states and dropping rows, with the buffer enlarged often, once or never."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    growing, plain = GrowingLayer(room), DynamicLayer()
    rows = 6
    for _ in range(25):
        if rows > 1 and source.random() < 0.25:
            kept = torch.tensor(sorted(source.sample(range(rows), source.randint(1, rows))))
            growing.batch_select_indices(kept)
            plain.batch_select_indices(kept)
            rows = len(kept) if plain.is_initialized else rows
        else:
            keys, values = torch.randn(2, rows, 3, source.randint(1, 4), 5)
            ours, theirs = growing.update(keys, values), plain.update(keys.clone(), values.clone())
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(1) == plain.get_mask_sizes(1)
    assert torch.equal(growing.keys, plain.keys)


def test_a_growing_layer_writes_in_place() -> None:
    layer = GrowingLayer(room=10)
    keys = torch.ones(1, 1, 3, 2)
    first, _ = layer.update(keys, keys)
    for _ in range(10):
        last, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert last.data_ptr() == first.data_ptr()
    after, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert after.data_ptr() != first.data_ptr()


@pytest.mark.parametrize(
    ("model_type", "settings", "total", "shares"),
    [
        ("llama", {}, 10**6, True),
        ("mistral", {"sliding_window": 100}, 99, True),
        ("mistral", {"sliding_window": 100}, 100, False),
        ("gemma3_text", {"sliding_window": 100, "layer_types": LOCAL_AND_FULL}, 99, True),
        ("gemma3_text", {"sliding_window": 100, "layer_types": LOCAL_AND_FULL}, 101, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 5, False),
        ("mamba", {}, 5, False),
    ],
)
def test_prefixes_are_shared_only_where_every_layer_keeps_every_position(
    model_type: str, settings: dict[str, Any], total: int, shares: bool
) -> None:
    assert can_share_prefixes(config(model_type, **settings), total) is shares


@pytest.mark.parametrize(
    ("model_type", "settings", "takes"),
    [
        ("llama", {}, True),
        ("mistral", {"sliding_window": 8}, True),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, True),
        ("deepseek_v32", {}, False),
    ],
)
def test_unknown_kinds_of_layer_go_one_row_at_a_time(model_type: str, settings: dict[str, Any], takes: bool) -> None:
    assert takes_batches(config(model_type, **settings)) is takes


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_rows_cut_out_of_a_shared_pass_equal_passes_of_their_own(
    model_type: str, random_model: Callable[..., Any]
) -> None:
    model = random_model(model_type)
    long, other = list(range(5, 17)), list(range(40, 47))
    width = len(long)
    padding = width - len(other)
    shared = empty_cache(model.config)
    ids = torch.tensor([long, [0] * padding + other])
    mask = torch.tensor([[1] * width, [0] * padding + [1] * len(other)])
    with torch.inference_mode():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            past_key_values=shared,
        )
        rows = row_cache(model.config, shared, [0, 1, 0, 1], [0, padding, 0, padding], [4, 7, 12, 0], room=3)
        for row, sequence in enumerate((long[:4], other, long)):
            own = DynamicCache(config=model.config)
            model(input_ids=torch.tensor([sequence]), past_key_values=own)
            for ours, theirs in zip(rows.layers, own.layers, strict=True):
                for name in ("keys", "values"):
                    cut = getattr(ours, name)[row : row + 1]
                    assert cut.shape[-2] == 12
                    assert torch.allclose(cut[:, :, 12 - len(sequence) :], getattr(theirs, name), atol=1e-5)
                    assert not cut[:, :, : 12 - len(sequence)].any()


def test_no_rows_with_anything_give_an_empty_cache() -> None:
    cache = row_cache(config("llama"), empty_cache(config("llama")), [0, 0], [0, 0], [0, 0], room=2)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        (
            "falcon_h1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        ),
    ],
)
def test_rows_that_are_kept_go_on_as_if_nothing_had_been_dropped(
    model_type: str, settings: dict[str, Any], random_model: Callable[..., Any]
) -> None:
    model = random_model(model_type, **settings)
    ids = torch.arange(5, 29).reshape(4, 6)
    kept = torch.tensor([1, 3])
    with torch.inference_mode():
        dropped, whole = empty_cache(model.config), empty_cache(model.config)
        for cache in (dropped, whole):
            assert not is_filled(cache)
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            assert is_filled(cache)
        keep_rows(dropped, kept)
        following = torch.tensor([[50], [51], [52], [53]])
        expected = model(input_ids=following, past_key_values=whole, use_cache=True).logits[kept]
        got = model(input_ids=following[kept], past_key_values=dropped, use_cache=True).logits
    assert torch.allclose(got, expected, atol=1e-4)


def test_a_cache_is_not_full_when_one_layer_keeps_its_state_elsewhere(random_model: Callable[..., Any]) -> None:
    """RecurrentGemma's attention uses the cache, its recurrent layers do not."""
    model = random_model("recurrent_gemma", lru_width=32, attention_window_size=6, num_hidden_layers=3)
    cache = empty_cache(model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    assert any(getattr(layer, "keys", None) is not None for layer in cache.layers)
    assert not is_filled(cache)
