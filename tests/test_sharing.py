"""Shared prefixes: attention against the textbook's, which models take part, and what happens when one does not."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from deepalign import decoding, sharing
from deepalign.batching import Job
from deepalign.decoding import shares_attention
from deepalign.generation import generate
from deepalign.records import Sampling
from deepalign.sharing import NotShared, SharedAttention, SharedCache

IDS = tuple(random.Random(1).choices(range(3, 97), k=30))


def filled(num_prefixes: int, columns: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*torch.randn(2, num_prefixes, heads, columns, width, dtype=dtype).unbind(), layer)
    return cache


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("float_mask", [True, False])
@pytest.mark.parametrize("sources", [[0, 0, 0, 1, 1, 1], [0, 1, 2], [2, 0, 1, 0, 0, 2, 0]])
def test_attention_is_the_textbooks(packed: bool, float_mask: bool, sources: list[int]) -> None:
    """Random masks on the prefixes, own tokens past the first buffer, rows and whole prefixes dropped on the way."""
    torch.manual_seed(len(sources) + packed)
    heads, groups, width, columns = 2, 3, 8, 11
    prefixes = filled(max(sources) + 1, columns, heads, width)
    old = [(layer.keys.clone(), layer.values.clone()) for layer in prefixes.layers]
    cache = SharedCache(prefixes, sources)
    rows = list(sources)
    own = [[torch.zeros(len(rows), heads, 0, width)] * 2 for _ in range(2)]
    seen = torch.rand(len(rows), columns) < 0.6
    for step in range(sharing._ROOM + 8):
        queries = torch.randn(len(rows), heads, groups, width)
        mask = torch.cat([seen, torch.ones(len(rows), step + 1, dtype=torch.bool)], dim=1)[:, None, None]
        given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if float_mask else mask
        with SharedAttention(cache):
            for number in range(2):
                states = torch.randn(2, len(rows), heads, 1, width)
                own[number] = [torch.cat([one, new], dim=2) for one, new in zip(own[number], states, strict=True)]
                keys, values = cache.update(*states, number)
                query = queries if packed else queries.flatten(1, 2).unsqueeze(2)
                out = scaled_dot_product_attention(query, keys, values, attn_mask=given, enable_gqa=not packed)
                whole = [
                    torch.cat([before[rows], mine], dim=2)
                    for before, mine in zip(old[number], own[number], strict=True)
                ]
                scores = queries @ whole[0].transpose(-1, -2) / math.sqrt(width)
                expected = scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ whole[1]
                torch.testing.assert_close(out.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == columns + step + 1
        if step in (3, 20) and len(rows) > 1:
            kept = torch.tensor([row for row in range(len(rows)) if row != step % 2])
            cache.keep(kept)
            rows = [rows[row] for row in kept.tolist()]
            own = [[one[kept] for one in pair] for pair in own]
            seen = seen[kept]
    assert cache.layers[0].prefix_keys.shape[0] == len(set(rows))


def test_other_attention_is_left_alone() -> None:
    cache = SharedCache(filled(1, 4, 2, 8), [0, 0])
    query, key, value = torch.randn(3, 2, 2, 5, 8)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    with SharedAttention(cache):
        assert torch.equal(scaled_dot_product_attention(query, key, value, is_causal=True), expected)
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def use(cache: SharedCache, **settings: Any) -> Any:
    keys, values = cache.update(*torch.randn(2, 2, 2, 1, 8), 0)
    query = torch.randn(2, 2, settings.pop("positions", 1), 8)
    return scaled_dot_product_attention(query, keys, settings.pop("values", values), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout_p": 0.1},
        {"is_causal": True},
        {"values": torch.zeros(2, 2, 32, 8)},
        {"attn_mask": torch.ones(2, 2, 1, 5)},
    ],
    ids=["dropout", "causal", "other values", "a mask for each head"],
)
def test_what_is_not_understood_is_refused(settings: dict[str, Any]) -> None:
    cache = SharedCache(filled(1, 4, 2, 8), [0, 0])
    with pytest.raises(NotShared), SharedAttention(cache):
        use(cache, **settings)


def test_keys_that_never_come_to_attention_are_noticed() -> None:
    cache = SharedCache(filled(1, 4, 2, 8), [0, 0])
    with pytest.raises(NotShared, match="did not come to attention"), SharedAttention(cache):
        cache.update(*torch.randn(2, 2, 2, 1, 8), 0)


@pytest.mark.parametrize(
    ("model_type", "config", "shares"),
    [
        ("llama", {}, True),
        ("llama", {"num_key_value_heads": 4}, True),
        ("qwen3", {}, True),
        ("gemma3_text", {"sliding_window": 512}, True),
        ("mistral", {"sliding_window": 512}, True),
        ("phi", {}, True),
        ("gpt2", {}, True),
        ("mixtral", {"num_local_experts": 4}, True),
        ("olmo2", {}, True),
        ("llama", {"attn_implementation": "eager"}, False),
        ("mistral", {"sliding_window": 6}, False),
        ("bloom", {"n_head": 4, "n_layer": 2}, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_shares(
    model_type: str, config: dict[str, Any], shares: bool, dtype: torch.dtype, random_model: Callable[..., Any]
) -> None:
    model = random_model(model_type, **config).to(dtype)
    assert shares_attention(model, IDS) is shares


@pytest.mark.parametrize("column", [0, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_would_write_something_else_is_found_out(
    column: int, dtype: torch.dtype, random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One column of the prefixes hidden: the least that a misunderstanding can do."""
    honest = SharedAttention._split

    def wrong(self: Any, *args: Any) -> Any:
        prefix, own = honest(self, *args)
        prefix = prefix.clone()
        prefix[..., column] = torch.finfo(prefix.dtype).min
        return prefix, own

    model = random_model("llama").to(dtype)
    assert shares_attention(model, IDS)
    monkeypatch.setattr(SharedAttention, "_split", wrong)
    assert not shares_attention(model, IDS)


def test_a_model_that_stops_sharing_midway_loses_nothing(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model("llama")
    jobs = [
        Job(ids=IDS[:length], sampling=Sampling(temperature=1.0, max_new_tokens=count), seed=length)
        for length, count in [(5, 3), (9, 12), (20, 12), (20, 4)]
    ]
    expected = sorted((one.index, one.token_ids) for one in generate(model, jobs, stop_ids=()))
    honest, calls = SharedAttention._attend, []

    def refuses(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 20:
            raise NotShared("a mask of shape (1, 2)")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(SharedAttention, "_attend", refuses)
    with caplog.at_level(logging.WARNING, logger="deepalign"):
        found = list(generate(model, jobs, stop_ids=(), max_batch=2))
    assert sorted((one.index, one.token_ids) for one in found) == expected
    assert caplog.text.count("does not share prefixes after all") == 1, "tried again for the second batch"
    assert "LlamaForCausalLM does not share prefixes after all (a mask of shape (1, 2))" in caplog.text


def test_few_ids_share_nothing(random_model: Callable[..., Any]) -> None:
    assert not shares_attention(random_model("llama"), IDS[:3])


def test_prefixes_are_held_once(random_model: Callable[..., Any]) -> None:
    rows = decoding.with_hosts(
        [Job(ids=IDS, sampling=Sampling(max_new_tokens=2), seed=seed) for seed in range(50)], range(50)
    )
    state = decoding.Decoding(random_model("llama"), rows, stop_ids=frozenset(), shared=True)
    assert state._cache.layers[0].prefix_keys.shape[0] == 1
    assert state._cache.layers[0].keys.shape[:3] == (50, 2, sharing._ROOM)
