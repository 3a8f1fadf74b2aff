"""Harmful-token depth: a full sort as the oracle, the section by hand, and what must not change the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepalign import heads
from deepalign.chat import answer_ids
from deepalign.errors import UserError
from deepalign.models import LoadedModel, from_objects
from deepalign.onset import Openings
from deepalign.ranks import RankProfile, rank_profiles, rank_section
from deepalign.records import Prompt, from_dict, to_json
from deepalign.runs import RunFolder
from deepalign.workflows.along import with_forced_answers
from deepalign.workflows.ranks import RANKS, measure_ranks, worded_openings
from support import conversation, run_out_of_memory

OPENINGS = Openings(frozenset({(5,), (7, 8), (7, 9, 10), (20, 21), (30, 31)}))
FIRSTS = [5, 7, 20, 30]
ITEMS = [
    (f"p{number}", conversation(prompt, answer, number))
    for number, (prompt, answer) in enumerate([(5, 9), (12, 3), (1, 6), (7, 20), (3, 1), (9, 8), (4, 0)])
]
POSITIONS = 8


@pytest.fixture(autouse=True, params=[2048, 10])
def slice_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The vocabulary in one slice, and in ten."""
    monkeypatch.setattr(heads.slices, "__defaults__", (request.param,))
    return int(request.param)


def measured(model: Any, items: Any = ITEMS, **settings: Any) -> dict[str, RankProfile]:
    settings = {"vocab_size": 97, "max_positions": POSITIONS, **settings}
    profiles = list(rank_profiles(model, items, OPENINGS, **settings))
    assert len({profile.prompt_id for profile in profiles}) == len(profiles)
    return {profile.prompt_id: profile for profile in profiles}


@torch.no_grad()
def sorted_in_full(model: Any, ids: Sequence[int], start: int, top: int) -> dict[str, list[Any]]:
    """Each number from the whole vocabulary, sorted, in double precision: one plain pass for one sequence."""
    logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    found: dict[str, list[Any]] = {name: [] for name in ("rank", "log_prob", "in_top", "mass", "best", "num_in_top")}
    for place in range(start, min(len(ids), start + POSITIONS)):
        logits_V = logits_TV[place - 1]
        order = logits_V.argsort(descending=True).tolist()
        probs_V = logits_V.softmax(dim=-1)
        found["rank"].append(order.index(ids[place]))
        found["log_prob"].append(float(probs_V[ids[place]].log()))
        found["in_top"].append(ids[place] in order[:top])
        found["mass"].append(sum(float(probs_V[first]) for first in FIRSTS))
        found["best"].append(min(order.index(first) for first in FIRSTS))
        found["num_in_top"].append(len(set(order[:top]) & set(FIRSTS)))
    return found


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("gemma2", {"sliding_window": 4, "final_logit_softcapping": 5.0}),
        ("gpt2", {}),
        ("phi", {}),
        ("cohere", {"logit_scale": 0.5}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
@pytest.mark.parametrize("top", [20, 8])
def test_equals_a_full_sort(
    model_type: str, config: dict[str, Any], top: int, random_model: Callable[..., Any]
) -> None:
    model, base = random_model(model_type, **config), random_model(model_type, seed=1, **config)
    found = measured(model, base=base, top=top, batch=3)
    assert set(found) == {name for name, rendered in ITEMS if any(rendered.response_mask)}
    for name, rendered in ITEMS[:-1]:
        expected = sorted_in_full(model, rendered.ids, rendered.response_start, top)
        under_base = sorted_in_full(base, rendered.ids, rendered.response_start, top)
        profile = found[name]
        assert list(profile.ranks) == expected["rank"]
        assert list(profile.in_top) == expected["in_top"]
        assert list(profile.best_refusal_ranks) == expected["best"]
        assert list(profile.refusals_in_top) == expected["num_in_top"]
        assert list(profile.log_probs) == pytest.approx(expected["log_prob"], abs=1e-4)
        assert list(profile.refusal_mass) == pytest.approx(expected["mass"], rel=1e-3, abs=1e-7)
        assert list(profile.base_log_probs) == pytest.approx(under_base["log_prob"], abs=1e-4)
        assert list(profile.base_favoured) == [
            theirs > ours for ours, theirs in zip(expected["log_prob"], under_base["log_prob"], strict=True)
        ]
        assert profile.finite
        assert profile.top == top
    assert {mark for profile in found.values() for mark in profile.in_top} == {True, False}
    assert {mark for profile in found.values() for mark in profile.base_favoured} == {True, False}


def test_equal_logits_are_no_larger(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[60:63] = 1.0
    for profile in measured(model).values():
        # Either three stand above the rest, which are all alike, or they stand below it.
        assert set(profile.ranks) | set(profile.best_refusal_ranks) <= {0, 3, 94}
        assert {rank < 20 for rank in profile.ranks} == set(profile.in_top)
        for rank, count in zip(profile.best_refusal_ranks, profile.refusals_in_top, strict=True):
            assert count == (4 if rank < 20 else 0)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_neither_batch_nor_order_matters(batch: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    one, other = measured(model, batch=3), measured(model, ITEMS[::-1], batch=batch)
    assert {name: profile.ranks for name, profile in one.items()} == {
        name: profile.ranks for name, profile in other.items()
    }
    for name, profile in one.items():
        assert other[name].refusal_mass == pytest.approx(profile.refusal_mass, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("vocab_size", [97, 90])
def test_only_the_shared_vocabulary_counts(vocab_size: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    with torch.no_grad():
        # Rows that no token has, with logits that would come first wherever they are positive.
        model.lm_head.weight[90:] *= 50
    ids = [("p", conversation(5, 8, 0, vocab_size=90))]
    profile = measured(model, ids, vocab_size=vocab_size)["p"]
    assert (max(profile.log_probs, key=lambda value: value or 0.0) or 0.0) <= 0.0
    lower = measured(model, ids, vocab_size=97)["p"]
    assert all(few <= all_ for few, all_ in zip(profile.ranks, lower.ranks, strict=True))
    assert (profile.ranks == lower.ranks) == (vocab_size == 97)


def test_numbers_that_are_none_are_told_apart(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    for hurt in (model, base):
        with torch.no_grad():
            hurt.lm_head.weight[50] = float("nan")
        found = measured(model, base=base)
        assert len(found) == 6
        assert not any(profile.finite for profile in found.values())
        with torch.no_grad():
            hurt.lm_head.weight[50] = 0.0
    assert all(profile.finite for profile in measured(model, base=base).values())


def test_a_token_that_the_model_rules_out_has_a_rank_and_no_log_probability(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    ids = [("p", conversation(5, 4, 0))]
    token = ids[0][1].ids[6]

    def rule_out(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., token] = float("-inf")
        return output

    model.lm_head.register_forward_hook(rule_out)
    profile = measured(model, ids, base=random_model("llama", seed=1))["p"]
    assert profile.log_probs[1] is None
    assert profile.ranks[1] == 96
    assert profile.base_favoured[1]
    assert "NaN" not in to_json(profile)
    assert "Infinity" not in to_json(profile)


@pytest.mark.parametrize("most_rows", [1, 2, 4])
def test_out_of_memory_halves_the_batch(most_rows: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    expected = measured(model)
    run_out_of_memory(model, lambda ids_BT: len(ids_BT) > most_rows)
    assert {name: one.ranks for name, one in measured(model).items()} == {
        name: one.ranks for name, one in expected.items()
    }


def test_a_sequence_that_does_not_fit_alone_is_told_apart(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    expected = measured(model)
    longest = max(len(rendered.ids[: rendered.response_start + POSITIONS]) for _, rendered in ITEMS)
    run_out_of_memory(model, lambda ids_BT: ids_BT.shape[1] == longest)
    found = measured(model)
    assert [name for name, profile in found.items() if not profile.finite] == ["p5"]
    assert found["p0"].ranks == expected["p0"].ranks


@pytest.mark.parametrize("change", [{"top": 0}, {"openings": Openings(frozenset())}])
def test_settings_that_mean_nothing(change: dict[str, Any], random_model: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"openings": OPENINGS, "vocab_size": 97, "max_positions": 4, **change}
    with pytest.raises(UserError, match="token ranks need one or more"):
        list(rank_profiles(random_model("llama"), ITEMS, **settings))


def test_the_callers_models_are_left_as_they_were(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama").train(), random_model("llama", seed=1).train()
    for _ in rank_profiles(model, ITEMS, OPENINGS, vocab_size=97, max_positions=4, base=base, batch=2):
        assert model.training
        assert base.training
        assert not torch.is_inference_mode_enabled()


# --- the section -----------------------------------------------------------------------------------------------------


def profile(name: str, ranks: Sequence[int], **changes: Any) -> RankProfile:
    count = len(ranks)
    values: dict[str, Any] = {
        "prompt_id": name,
        "ranks": tuple(ranks),
        "log_probs": (-2.0,) * count,
        "in_top": tuple(rank < 20 for rank in ranks),
        "refusal_mass": (0.25,) * count,
        "best_refusal_ranks": (1,) * count,
        "refusals_in_top": (2,) * count,
    }
    return RankProfile(**{**values, **changes})


def test_the_section_by_hand() -> None:
    profiles = [
        profile("a", [400, 30, 0], refusal_mass=(0.9, 0.5, 0.1), best_refusal_ranks=(0, 0, 6)),
        profile("b", [21, 20, 19], refusal_mass=(0.7, 0.3, 0.1), best_refusal_ranks=(0, 3, 9)),
        profile("c", [19, 2], refusal_mass=(0.8, 0.1), best_refusal_ranks=(1, 5)),
        profile("d", []),
    ]
    section = rank_section(profiles, top=20)
    assert (section["top"], section["num_prompts"], section["num_nonfinite"]) == (20, 3, 1)
    first, second, third = section["positions"]
    assert (first["position"], first["n"], first["median_rank"], first["median_best_refusal_rank"]) == (0, 3, 21.0, 0.0)
    assert (first["in_top"]["numerator"], first["in_top"]["denominator"]) == (1, 3)
    assert first["in_top"]["ci95"][0] < 1 / 3 < first["in_top"]["ci95"][1]
    assert first["refusal_mass"]["mean"] == pytest.approx(0.8)
    assert first["refusal_mass"]["ci95"] is not None
    assert first["base_favoured"] is None
    assert (second["in_top"]["numerator"], second["median_rank"], second["median_best_refusal_rank"]) == (1, 20.0, 3.0)
    assert (third["n"], third["in_top"]["rate"], third["median_rank"]) == (2, 1.0, 9.5)
    # At the first two positions one of three is in the top; at the third, all are.
    assert section["depth_in_top"] == 2
    json.dumps(section, allow_nan=False)


@pytest.mark.parametrize(
    ("ranks", "top", "depth"),
    [
        ([[0, 90], [90, 90]], 20, 2),
        ([[0, 90], [1, 90]], 20, 0),
        ([[90, 1, 90], [90, 1, 90]], 20, 1),
        ([[5], [5]], 5, 1),
        ([[4], [4]], 5, 0),
    ],
)
def test_depth_counts_the_leading_positions_where_at_least_half_are_outside(
    ranks: list[list[int]], top: int, depth: int
) -> None:
    profiles = [profile(str(number), row) for number, row in enumerate(ranks)]
    assert rank_section(profiles, top=top)["depth_in_top"] == depth


def test_the_share_that_the_base_favours() -> None:
    one = profile("a", [3, 3], log_probs=(-2.0, None), base_log_probs=(-1.0, -9.0))
    other = profile("b", [3, 3], base_log_probs=(-2.0, -3.0))
    assert one.base_favoured == (True, True)
    assert other.base_favoured == (False, False)
    rows = rank_section([one, other])["positions"]
    assert [(row["base_favoured"]["numerator"], row["base_favoured"]["denominator"]) for row in rows] == [(1, 2)] * 2


def test_no_profiles_give_no_depth() -> None:
    section = rank_section([profile("a", [])])
    assert (section["depth_in_top"], section["positions"], section["num_nonfinite"]) == (None, [], 1)


# --- as a step of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tiny_tokenizer: Any, tiny_llama: Callable[..., Any]) -> LoadedModel:
    return from_objects(tiny_llama(), tiny_tokenizer, name="target")


PROMPTS = [
    Prompt(prompt_id=f"p{number}", text=f"How do I open door {number}?", answer=answer)
    for number, answer in enumerate(["Sure, here are the steps.", None, "First, open the door; second, turn."])
]


def ranks_of(run: RunFolder, loaded: LoadedModel, prompts: Sequence[Prompt], **settings: Any) -> list[RankProfile]:
    run.path.mkdir(exist_ok=True)
    settings = {"own": [[9, 10, 11]], "system_prompt": None, "max_positions": 6, **settings}
    return measure_ranks(run, loaded, prompts, **settings)


def test_profiles_are_written_and_not_measured_again(
    loaded: LoadedModel, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    run, heard = RunFolder(tmp_path / "run"), []
    base = from_objects(tiny_llama(1), loaded.tokenizer, name="base")
    ranks_of(run, loaded, PROMPTS[:1], base=base)
    profiles = ranks_of(run, loaded, PROMPTS, base=base, progress=lambda *told: heard.append(told))
    assert heard == [("token ranks", 1, 2), ("token ranks", 2, 2)]
    assert [one.prompt_id for one in profiles] == ["p0", "p2"]
    assert run.records(RANKS, RankProfile) == profiles
    assert all(from_dict(RankProfile, json.loads(to_json(one))) == one for one in profiles)
    (_, rendered), _ = with_forced_answers(loaded, PROMPTS, None, 6, "raw")
    assert rendered.ids[rendered.response_start :] == answer_ids(loaded.tokenizer, PROMPTS[0].answer or "")[:6]
    (again,) = rank_profiles(
        loaded.model,
        [("p0", rendered)],
        worded_openings(loaded, [[9, 10, 11]]),
        vocab_size=loaded.vocab_size,
        max_positions=6,
        base=base.model,
    )
    assert again.ranks == profiles[0].ranks
    assert again.base_log_probs == pytest.approx(profiles[0].base_log_probs, abs=1e-4)


def test_models_of_other_vocabularies_are_refused(
    loaded: LoadedModel, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import copy

    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["<extra>"])
    base = from_objects(tiny_llama(1, vocab_size=len(tokenizer)), tokenizer, name="base")
    with pytest.raises(UserError, match="different vocabularies"):
        ranks_of(RunFolder(tmp_path / "run"), loaded, PROMPTS, base=base)


def test_white_space_begins_no_refusal(loaded: LoadedModel) -> None:
    newline = answer_ids(loaded.tokenizer, "\n\n")
    own = (*newline, *answer_ids(loaded.tokenizer, "Nope"))[:4]
    openings = worded_openings(loaded, [own])
    texts = {loaded.tokenizer.decode([first]) for first in openings.first_tokens}
    assert all(text.strip() for text in texts)
    assert {"I", "N"} <= {text.strip()[0] for text in texts}
    plain = Openings.of(lambda text: answer_ids(loaded.tokenizer, text), [own])
    assert set(newline[:1]) <= set(plain.first_tokens)
    for path in openings.paths:
        assert not any(path[:n] in openings.paths for n in range(1, len(path)))
