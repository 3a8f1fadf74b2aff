"""Losses of candidates: what a plain forward pass gives, whatever is shared, cut or split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.suffix.behaviours import Behaviour, Ids
from deepalign.suffix.losses import TargetLosses, passes, reduced
from deepalign.suffix.reading import Reader, reader_for
from support import run_out_of_memory

ARCHITECTURES = [
    ("llama", {}, True),
    ("llama", {"tie_word_embeddings": True}, True),
    ("qwen3", {}, True),
    # Embeddings scaled, logits capped, windows that do not fill.
    ("gemma2", {"sliding_window": 512, "final_logit_softcapping": 5.0}, True),
    ("gemma3_text", {"sliding_window": 512}, True),
    ("gpt_neox", {}, True),
    ("phi", {}, True),
    ("gpt2", {}, True),
    ("cohere", {"logit_scale": 0.25}, True),
    ("mixtral", {"num_local_experts": 4}, True),
    # Windows that forget, and states that cannot be cut.
    ("mistral", {"sliding_window": 4}, False),
    ("gemma3_text", {"sliding_window": 8}, False),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
    ("rwkv", {"attention_hidden_size": 32}, False),
]
NAMES = [f"{name}-{number}" for number, (name, _, _) in enumerate(ARCHITECTURES)]


@torch.no_grad()
def plain_nats(model: Any, at: Behaviour, suffix: Ids) -> Tensor:
    """Cross-entropy of each target token by the model's own forward pass over the whole row."""
    ids = torch.tensor([at.with_suffix(suffix) + at.target_ids])
    logits_SV = model(input_ids=ids, use_cache=False).logits[0].double()
    start = ids.shape[1] - len(at.target_ids)
    logps_SV = logits_SV.log_softmax(dim=-1)
    return torch.stack([-logps_SV[place - 1, int(ids[0, place])] for place in range(start, ids.shape[1])])


def reader_of(model: Any, at: Behaviour, near: Ids, **settings: Any) -> Reader:
    return reader_for(model, at.before_ids, near + at.after_ids, at.target_ids, **settings)


@pytest.mark.parametrize(("model_type", "config", "cached"), ARCHITECTURES, ids=NAMES)
def test_every_way_of_reading_equals_a_plain_pass(
    model_type: str,
    config: dict[str, Any],
    cached: bool,
    random_model: Callable[..., Any],
    random_behaviour: Callable[..., Behaviour],
    near_and_candidates: tuple[Ids, list[Ids]],
) -> None:
    model, at, (near, candidates) = random_model(model_type, **config), random_behaviour(), near_and_candidates
    expected = [float(plain_nats(model, at, ids).mean()) for ids in candidates]
    assert len({round(value, 3) for value in expected}) > 8, "too monotonous to tell right from wrong"
    for settings in ({"cached": False}, {"cached": True}):
        reader = reader_of(model, at, near, **settings)
        assert reader.cached == (cached and settings["cached"])
        for shared in (False, True):
            losses = TargetLosses(reader, at, shared=shared)
            losses.near(near)
            for _ in range(2):
                # Twice: nothing that the first pass wrote may be seen by the second.
                assert losses.of(candidates).losses_N.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-5)
            assert losses.score(candidates[0]).loss == pytest.approx(expected[0], rel=2e-5, abs=2e-5)


def test_the_head_is_used_by_itself_where_it_is_all_there_is(
    random_model: Callable[..., Any], random_behaviour: Callable[..., Behaviour]
) -> None:
    at = random_behaviour()
    for model_type in ("llama", "gemma2", "cohere", "gpt_neox"):
        assert reader_of(random_model(model_type), at, (5, 6)).head is not None
    model = random_model("llama")
    # A head that does more than its matrix says.
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2.0)
    reader = reader_of(model, at, (5, 6))
    assert (reader.head, reader.cached) == (None, True)
    found = TargetLosses(reader, at).score((5, 6))
    assert list(found.nats) == pytest.approx(plain_nats(model, at, (5, 6)).tolist(), rel=2e-5)


def test_greedy_matches_are_told(random_model: Callable[..., Any], random_behaviour: Callable[..., Behaviour]) -> None:
    model, at = random_model("llama"), random_behaviour()
    suffix = (7, 8, 9)
    ids = list(at.with_suffix(suffix))
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = tuple(ids[-4:])
    for target, matched in ((greedy, True), ((*greedy[:3], (greedy[3] + 1) % 97), False)):
        reached = dataclasses.replace(at, target_ids=target)
        losses = TargetLosses(reader_of(model, reached, suffix), reached)
        losses.near(suffix)
        assert losses.score(suffix).matched is matched
        assert losses.of([suffix, (9, 9, 9)]).matched_N.tolist() == [matched, False]


def test_mellowmax_by_hand() -> None:
    nats = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    found = reduced(nats, 2.0).tolist()
    assert found == pytest.approx([math.log((math.exp(2.0) + math.exp(6.0)) / 2) / 2, 2.0])
    assert reduced(nats, None).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("most_rows", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_out_of_memory_splits_the_batch_and_is_remembered(
    cached: bool,
    most_rows: int,
    random_model: Callable[..., Any],
    random_behaviour: Callable[..., Behaviour],
    near_and_candidates: tuple[Ids, list[Ids]],
) -> None:
    model, at, (near, candidates) = random_model("llama"), random_behaviour(), near_and_candidates
    losses = TargetLosses(reader_of(model, at, near, cached=cached), at)
    losses.near(near)
    expected = losses.of(candidates).losses_N
    failures = []
    run_out_of_memory(model, lambda ids_BT: len(ids_BT) > most_rows and failures.append(1) is None)
    assert losses.of(candidates).losses_N.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert failures
    failures.clear()
    losses.of(candidates)
    assert not failures


def test_what_memory_cannot_hold_or_is_no_number_is_infinite(
    random_model: Callable[..., Any], random_behaviour: Callable[..., Behaviour]
) -> None:
    model, at = random_model("llama"), random_behaviour()
    losses = TargetLosses(reader_of(model, at, (5, 6)), at)
    run_out_of_memory(model, lambda ids_BT: bool((ids_BT == 77).any()))
    found = losses.of([(5, 6), (77, 6)])
    assert [math.isfinite(value) for value in found.losses_N.tolist()] == [True, False]
    with torch.no_grad():
        model.model.embed_tokens.weight[42] = math.nan
    assert losses.of([(42, 42)]).losses_N.tolist() == [math.inf]


@pytest.mark.parametrize("most_rows", [1, 3, 100])
@pytest.mark.parametrize("most_positions", [10, 60, 10_000])
def test_passes_cover_every_row_once_within_their_limits(most_positions: int, most_rows: int) -> None:
    lengths = (3, 3, 4, 9, 9, 9, 9, 10, 21, 22)
    found = passes(lengths, most_positions, most_rows)
    assert [row for first, last in found for row in range(first, last)] == list(range(len(lengths)))
    for first, last in found:
        assert last - first == 1 or (last - first) * lengths[last - 1] <= most_positions
        assert last - first <= most_rows


def test_passes_are_cut_where_it_pays() -> None:
    lengths = (2,) * 50 + (30,) * 50
    assert passes(lengths, 10_000, 1000, 64) == ((0, 50), (50, 100))
    assert passes(lengths, 10_000, 1000, 10_000) == ((0, 100),)


def test_the_callers_model_is_left_as_it_was(
    random_model: Callable[..., Any],
    random_behaviour: Callable[..., Behaviour],
    near_and_candidates: tuple[Ids, list[Ids]],
) -> None:
    model, at, (near, candidates) = random_model("llama"), random_behaviour(), near_and_candidates
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = TargetLosses(reader_of(model, at, near), at)
    losses.near(near)
    losses.of(candidates)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
