"""Refusal onset: a brute-force sum over openings, the hazard by hand, and what must not change the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepalign import onset
from deepalign.branches import Together
from deepalign.chat import Rendered
from deepalign.onset import OnsetProfile, Openings, onset_profiles, onsets, refusal_within
from support import conversation, run_out_of_memory

PATHS = frozenset({(5,), (7, 8), (7, 9, 10), (7, 9, 11), (20, 21, 22, 23), (30, 31)})
OPENINGS = Openings(PATHS)


ITEMS = [
    (f"p{number}", conversation(prompt, answer, number))
    for number, (prompt, answer) in enumerate([(5, 9), (12, 3), (1, 6), (7, 20), (3, 1), (9, 8)])
]


@torch.no_grad()
def brute_force(model: Any, rendered: Rendered, max_positions: int) -> list[float]:
    """At each position, the sum over openings of the product of their tokens' probabilities, one plain pass each."""
    values = []
    for place in range(rendered.response_start, len(rendered.ids))[:max_positions]:
        total = 0.0
        for path in PATHS:
            ids = [*rendered.ids[:place], *path]
            probs_TV = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(dim=-1)
            chance = 1.0
            for step, token in enumerate(path):
                chance *= float(probs_TV[place - 1 + step, token])
            total += chance
        values.append(total)
    return values


def measured(model: Any, items: Any = ITEMS, **settings: Any) -> dict[str, OnsetProfile]:
    settings = {"vocab_size": 97, "max_positions": 8, **settings}
    return {profile.prompt_id: profile for profile in onset_profiles(model, items, OPENINGS, **settings)}


@pytest.fixture
def all_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onset, "_LEAST_MASS", 0.0)
    monkeypatch.setattr(onset, "_MOST_BRANCHES", 100)


@pytest.mark.usefixtures("all_branches")
@pytest.mark.parametrize(
    ("model_type", "config", "together"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("qwen3", {}, True),
        ("gemma3_text", {"sliding_window": 512}, True),
        ("gpt2", {}, True),
        ("phi", {}, True),
        ("mixtral", {"num_local_experts": 4}, True),
        # Windows that forget: beginnings put behind the answer would lose what a plain sequence still sees.
        ("mistral", {"sliding_window": 4}, False),
        ("bloom", {"n_head": 4, "n_layer": 2}, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
        ("rwkv", {"attention_hidden_size": 32}, False),
    ],
)
def test_equals_brute_force(
    model_type: str,
    config: dict[str, Any],
    together: bool,
    random_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(model_type, **config)
    ways = set()
    honest = onset._may_read_together

    def noting(*args: Any) -> bool:
        same = honest(*args)
        ways.add(same)
        return same

    monkeypatch.setattr(onset, "_may_read_together", noting)
    found = measured(model, batch=4)
    assert set(found) == {name for name, _ in ITEMS}
    for name, rendered in ITEMS:
        assert found[name].checked == pytest.approx(brute_force(model, rendered, 8), rel=2e-3, abs=1e-6)
        assert sum(found[name].unchecked) == pytest.approx(0.0, abs=1e-9)
    assert ways == {together}


@pytest.mark.usefixtures("all_branches")
@pytest.mark.parametrize("batch", [1, 2, 100])
def test_neither_batch_nor_order_matters(batch: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    alone, other = measured(model, batch=3), measured(model, ITEMS[::-1], batch=batch)
    for name, profile in alone.items():
        assert other[name].checked == pytest.approx(profile.checked, rel=1e-4, abs=1e-7)


def test_what_is_not_branched_on_counts_by_the_share_of_what_is(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    monkeypatch.setattr(onset, "_LEAST_MASS", 0.0)
    monkeypatch.setattr(onset, "_MOST_BRANCHES", 2)
    found = measured(model)
    assert sum(sum(profile.unchecked) > 0 for profile in found.values()) >= 5
    profiles = list(found.values())
    share = sum(profile.accepted for profile in profiles) / sum(profile.branched for profile in profiles)
    assert 0 < share < 1
    for profile, values in zip(profiles, onsets(profiles), strict=True):
        expected = [sure + share * rest for sure, rest in zip(profile.checked, profile.unchecked, strict=True)]
        assert list(values) == pytest.approx(expected)


def test_small_masses_cost_no_pass(random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onset, "_LEAST_MASS", 1.1)
    monkeypatch.setattr(onset, "_may_read_together", lambda *_: True)
    monkeypatch.setattr(Together, "after", lambda *_: pytest.fail("read a branch"))
    found = measured(random_model("llama"))
    assert {profile.branched for profile in found.values()} == {0.0}
    # With nothing to go by, all of it may be the beginning of a refusal.
    (one,) = onsets([found["p0"]])
    assert one == pytest.approx([a + b for a, b in zip(found["p0"].checked, found["p0"].unchecked, strict=True)])


def test_numbers_that_are_none_are_told_apart(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = measured(model)
    assert len(found) == len(ITEMS)
    assert not any(profile.finite for profile in found.values())


def test_an_opening_that_begins_another_stands_for_it() -> None:
    ids = {"Sorry": (1,), " Sorry": (2, 1), "I cannot": (3, 4), "I can't": (3, 5, 6)}
    found = Openings.of(lambda text: ids.get(text, ()), own=[(1, 9, 9), (3, 4, 8), (7, 7, 7, 7, 7)])
    assert found.paths == {(1,), (2, 1), (3, 4), (3, 5, 6), (7, 7, 7, 7)}
    assert found.first_tokens == [1, 2, 3, 7]
    assert found.nodes_under(3) == [(3,), (3, 5)]
    assert found.next_tokens((3,)) == [4, 5]
    assert found.next_tokens((3, 5)) == [6]
    assert found.nodes_under(1) == []


def test_every_listed_opening_is_found_at_each_place(tiny_tokenizer: Any) -> None:
    found = Openings.of(lambda text: tuple(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]))
    for text in ("I cannot help", " I'm sorry, but", "\n\nI am unable to", "As an AI language model"):
        ids = tuple(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
        assert any(ids[:n] in found.paths for n in range(1, 5)), text


@pytest.mark.parametrize(
    ("k", "horizon", "expected"),
    [(0, 1, 0.5), (0, 2, 0.75), (1, 2, 0.5), (2, 2, 1.0), (0, 4, 1.0), (3, 1, 1.0), (3, 2, None), (4, 1, None)],
)
def test_the_hazard_by_hand(k: int, horizon: int, expected: float | None) -> None:
    assert refusal_within((0.5, 0.5, 0.0, 1.0), k, horizon) == expected


def test_the_callers_model_is_left_as_it_was(random_model: Callable[..., Any]) -> None:
    model = random_model("llama").train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    measured(model)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("all_branches")
@pytest.mark.parametrize("most_rows", [1, 2, 4])
def test_out_of_memory_halves_the_batch(most_rows: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    expected = measured(model)
    run_out_of_memory(model, lambda ids_BT: len(ids_BT) > most_rows)
    for name, profile in measured(model).items():
        assert profile.checked == pytest.approx(expected[name].checked, rel=1e-4, abs=1e-7)


@pytest.mark.usefixtures("all_branches")
def test_a_sequence_that_does_not_fit_alone_is_told_apart(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    expected = measured(model)
    monkeypatch.setattr(onset, "_may_read_together", lambda *_: True)
    longest = max(len(rendered.ids[: rendered.response_start + 8]) for _, rendered in ITEMS)
    run_out_of_memory(model, lambda ids_BT: ids_BT.shape[1] == longest)
    found = measured(model)
    assert [name for name, profile in found.items() if not profile.finite] == ["p5"]
    assert found["p0"].checked == pytest.approx(expected["p0"].checked, rel=1e-4, abs=1e-7)


@pytest.mark.usefixtures("all_branches")
def test_a_branch_that_gets_too_thin_counts_by_the_share_of_the_others(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tokens are looked into, what follows them only above a mass; nothing of it may be lost."""
    model = random_model("llama")
    everything = measured(model)
    monkeypatch.setattr(onset, "_LEAST_MASS", 0.004)
    some = measured(model)
    thinner = 0
    for name, profile in some.items():
        whole = everything[name]
        # Certain mass is never more than all of it, and with what was not looked into never less.
        for part, rest, full in zip(profile.checked, profile.unchecked, whole.checked, strict=True):
            assert part <= full + 1e-9
            assert full <= part + rest + 1e-9
            thinner += part < full - 1e-9
        assert profile.branched <= whole.branched + 1e-9
    assert thinner > 5
