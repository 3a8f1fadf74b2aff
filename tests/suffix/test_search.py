"""The search: losses are the model's own and go down, nothing is read twice, a stopped one goes on to the same end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepalign.chat import ChatTemplate, conversation, render
from deepalign.errors import UserError
from deepalign.suffix import search as search_module
from deepalign.suffix.beginning import initial_suffix
from deepalign.suffix.behaviours import Behaviour, Ids
from deepalign.suffix.panel import Panel
from deepalign.suffix.search import SearchSettings, SearchState, search

SMALL: dict[str, Any] = {"suffix_tokens": 6, "steps": 6, "search_width": 24, "topk": 40, "early_stop": False}


def run(model: Any, tokenizer: Any, behaviours: list[Behaviour], **settings: Any) -> Any:
    asked = {name: settings.pop(name) for name in ("state", "on_step", "confirm", "progress") if name in settings}
    return search(model, tokenizer, behaviours, SearchSettings(**{**SMALL, **settings}), **asked)


@torch.no_grad()
def loss_from_text(model: Any, tokenizer: Any, at: Behaviour, text: str) -> float:
    """What the target costs behind the prompt and the suffix's text, rendered as the evaluation does it."""
    prompt = render(tokenizer, at.template, conversation(f"{at.text} {text}", at.system_prompt)).ids
    ids = torch.tensor([prompt + at.target_ids])
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
    return float(-logps.gather(1, torch.tensor(at.target_ids).unsqueeze(1)).mean())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffer": {"buffer_size": 3},
    "momentum": {"momentum": 0.5},
    "merge": {"merge": 5},
    "greedy": {"order": "greedy"},
    "several": {"n_replace": 3, "n_replace_steps": 4},
    "mellowmax": {"mellowmax": 1.0},
    "screen": {"screen": True},
    "uncached": {"prefix_cache": False},
    "unshared": {"shared_positions": False},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_loss_goes_down_and_is_that_of_the_text(
    name: str, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model, at = tiny_llama(), behaviours[0]
    first: list[float] = []
    found = run(model, tiny_tokenizer, [at], on_step=lambda state: first.append(state.loss), **OPTIONS[name])
    assert found.steps == 6
    assert found.stopped == "steps"
    assert list(found.trace) == first
    if name != "mellowmax":
        begun = run(model, tiny_tokenizer, [at], steps=0).losses[0]
        assert found.losses[0] < begun - 0.05
        assert found.losses[0] == pytest.approx(loss_from_text(model, tiny_tokenizer, at, found.text), rel=1e-4)
        assert min(found.trace) == pytest.approx(found.losses[0], rel=1e-4)
    assert found.comes_back
    assert found.evaluated >= 6 * 20


def test_shared_and_cached_searches_are_the_same_search(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama()
    ways = ({}, {"prefix_cache": False}, {"shared_positions": False})
    found = [run(model, tiny_tokenizer, behaviours[:1], **way) for way in ways]
    assert len({one.suffix_ids for one in found}) == 1
    for one in found[1:]:
        assert one.trace == pytest.approx(found[0].trace, rel=1e-4)


def test_no_suffix_is_read_twice_and_none_that_drifts(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Ids] = []
    honest = Panel.read

    def noting(self: Any, chosen: Any, candidates: Any, *args: Any, **settings: Any) -> Any:
        read.extend(candidates)
        return honest(self, chosen, candidates, *args, **settings)

    monkeypatch.setattr(Panel, "read", noting)
    found = run(tiny_llama(), tiny_tokenizer, behaviours[:1], buffer_size=1, merge=3, topk=8, steps=12)
    assert len(set(read)) == len(read) == found.evaluated
    assert found.repeated > 0
    assert found.drifted > 0
    at = behaviours[0]
    for ids in read[::7]:
        text = search_module.suffix_text(tiny_tokenizer, at, ids)
        assert render(tiny_tokenizer, at.template, conversation(f"{at.text} {text}", None)).ids == at.with_suffix(ids)


class Killed(Exception):
    """What stops a search."""


RESUMED = {
    "one": ({}, 1),
    "all": ({"momentum": 0.5, "buffer_size": 2, "merge": 3, "screen": True}, 1),
    "universal": ({"behaviours_per_step": 1, "momentum": 0.3, "progressive": False, "rescored": 4}, 3),
}


@pytest.mark.parametrize("name", list(RESUMED))
@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_search_goes_on_to_the_same_end(
    name: str, killed_after: int, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    settings, count = RESUMED[name]
    model, asked = tiny_llama(), behaviours[:count]
    whole = run(model, tiny_tokenizer, asked, **settings)
    written = ""

    def killing(state: SearchState) -> None:
        nonlocal written
        written = json.dumps(state.to_json())
        if state.step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        run(model, tiny_tokenizer, asked, on_step=killing, **settings)
    torch.manual_seed(5)
    resumed = run(model, tiny_tokenizer, asked, state=SearchState.from_json(json.loads(written)), **settings)
    assert resumed == whole


def test_a_search_may_be_made_longer_but_not_another(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model, kept = tiny_llama(), []
    run(model, tiny_tokenizer, behaviours[:1], steps=2, on_step=kept.append)
    state = kept[-1].to_json()
    longer = run(model, tiny_tokenizer, behaviours[:1], state=SearchState.from_json(state))
    assert longer == run(model, tiny_tokenizer, behaviours[:1])
    for settings, asked in (({"seed": 3}, behaviours[:1]), ({}, behaviours[1:2])):
        with pytest.raises(UserError, match="belongs to a search with other settings or behaviours"):
            run(model, tiny_tokenizer, asked, state=SearchState.from_json(state), **settings)
    with pytest.raises(UserError, match="no state of a suffix search"):
        SearchState.from_json({"suffix": [1]})


def test_seeds_reproduce_and_differ(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama()
    torch.manual_seed(0)
    first = run(model, tiny_tokenizer, behaviours[:1])
    torch.manual_seed(1)
    assert run(model, tiny_tokenizer, behaviours[:1]) == first
    assert run(model, tiny_tokenizer, behaviours[:1], seed=1).suffix_ids != first.suffix_ids


def reaching(target: Behaviour, tokenizer: Any, text: str) -> Behaviour:
    """The same behaviour with a target of one token, which a random model soon gives."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return dataclasses.replace(target, target_ids=ids[:1], target=tokenizer.decode(list(ids[:1])))


def greedy_first(model: Any, tokenizer: Any, at: Behaviour, text: str) -> int:
    prompt = render(tokenizer, at.template, conversation(f"{at.text} {text}", None)).ids
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())


def test_it_stops_when_the_target_is_reached_and_confirmed(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model, at = tiny_llama(), reaching(behaviours[0], tiny_tokenizer, "Sure")
    asked: list[str] = []

    def confirm(text: str) -> bool:
        asked.append(text)
        return len(asked) == 2

    found = run(model, tiny_tokenizer, [at], steps=60, early_stop=True, confirm=confirm)
    assert found.stopped == "matched"
    assert found.steps < 60
    assert found.denied == 1
    assert found.matched == (True,)
    assert found.text == asked[1] != asked[0]
    for text in asked:
        assert greedy_first(model, tiny_tokenizer, at, text) == at.target_ids[0]
    alone = run(model, tiny_tokenizer, [at], steps=60, early_stop=True)
    assert alone.text == asked[0]
    kept_on = run(model, tiny_tokenizer, [at], steps=alone.steps + 2, early_stop=False)
    assert kept_on.stopped == "steps"


def test_behaviours_are_taken_in_as_targets_are_reached(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama()
    asked = [reaching(at, tiny_tokenizer, "First") for at in behaviours]
    counts: list[int] = []
    settings = {"steps": 40, "early_stop": True, "buffer_size": 1}
    found = run(model, tiny_tokenizer, asked, on_step=lambda state: counts.append(state.active), **settings)
    assert counts == sorted(counts)
    assert counts[0] < 3
    assert (found.stopped, found.active, found.matched) == ("matched", 3, (True, True, True))
    for at in asked:
        assert greedy_first(model, tiny_tokenizer, at, found.text) == at.target_ids[0]
    together = run(model, tiny_tokenizer, asked, progressive=False)
    assert together.active == 3
    expected = [loss_from_text(model, tiny_tokenizer, at, together.text) for at in asked]
    assert list(together.losses) == pytest.approx(expected, rel=1e-4)
    assert min(together.trace) == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_candidates_chosen_by_a_few_behaviours_are_told_by_all(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama()
    settings = {"behaviours_per_step": 1, "progressive": False, "rescored": 4, "steps": 3}
    found = run(model, tiny_tokenizer, behaviours, **settings)
    expected = [loss_from_text(model, tiny_tokenizer, at, found.text) for at in behaviours]
    assert min(found.trace) == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_several_behaviours_weigh_alike_in_the_gradient(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    suffix = initial_suffix(tiny_tokenizer, behaviours, SearchSettings(suffix_tokens=6))
    panel = Panel(tiny_llama(), behaviours, SearchSettings(), suffix)
    alone = [panel.gradient([number], suffix) for number in range(3)]
    expected = sum(one / one.norm(dim=-1, keepdim=True) for one in alone)
    assert torch.allclose(panel.gradient([0, 1, 2], suffix), expected, atol=1e-5)


def test_where_single_changes_are_used_up_it_goes_on_with_more(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    settings = {"buffer_size": 1, "topk": 2, "suffix_tokens": 3, "steps": 12}
    barren: list[int] = []
    found = run(
        tiny_llama(), tiny_tokenizer, behaviours[:1], on_step=lambda state: barren.append(state.barren), **settings
    )
    assert 1 in barren, "the premise"
    assert 0 in barren[barren.index(1) :]
    assert found.stopped == "steps"
    assert found.evaluated > 3 * 2


def test_a_search_without_candidates_says_so(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "survivors", lambda tokenizer, at, candidates: [None] * len(candidates))
    found = run(tiny_llama(), tiny_tokenizer, behaviours[:1], steps=50)
    assert (found.stopped, found.evaluated, found.comes_back) == ("no candidates", 0, False)
    assert found.drifted > 0
    assert found.steps < 50


def test_the_callers_model_is_left_as_it_was(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    told: list[tuple[str, int, int]] = []
    run(model, tiny_tokenizer, behaviours[:1], steps=2, screen=True, progress=lambda *args: told.append(args))
    assert told == [("suffix", 0, 2), ("suffix", 1, 2), ("suffix", 2, 2)]
    assert model.training
    assert model.dtype == torch.float32
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"behaviours": []}, "there are 0 behaviours"),
        ({"initial": "bread \n"}, "the initial suffix 'bread .n' does not come back"),
    ],
)
def test_mistakes_are_named(
    settings: dict[str, Any],
    message: str,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    behaviours: list[Behaviour],
) -> None:
    trimming = tiny_tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    template = ChatTemplate(text=trimming, source="test")
    asked = settings.pop("behaviours", [dataclasses.replace(behaviours[0], template=template)])
    with pytest.raises(UserError, match=message):
        run(tiny_llama(), tiny_tokenizer, asked, **settings)


def test_half_precision_models_are_searched_as_they_are(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    begun = run(model, tiny_tokenizer, behaviours[:1], steps=0).losses[0]
    found = run(model, tiny_tokenizer, behaviours[:1], screen=True)
    assert found.losses[0] < begun - 0.05
    assert found.losses[0] == pytest.approx(loss_from_text(model, tiny_tokenizer, behaviours[0], found.text), rel=0.05)
