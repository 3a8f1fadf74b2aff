"""KL by position: hand numbers, a textbook loop in double precision, and what must not change the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign import heads
from deepalign.chat import Rendered
from deepalign.depth import KlProfile, check_vocabularies, kl_by_slices, kl_profiles
from deepalign.errors import UserError
from deepalign.models import from_objects
from support import conversation, run_out_of_memory

INF = float("inf")


def source(logits_NV: Tensor) -> heads.LogitSource:
    return lambda first, last: logits_NV[:, first:last]


def logits_of(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float()


ITEMS = [
    (f"p{number}", conversation(prompt, answer, number))
    for number, (prompt, answer) in enumerate([(5, 9), (12, 3), (1, 6), (7, 20), (3, 1), (9, 8)])
]


def textbook_kl(model: Any, base: Any, rendered: Rendered, max_positions: int) -> tuple[list[float], list[float]]:
    """Full logits, one sequence, one position at a time, float64."""
    ids = torch.tensor([rendered.ids])
    with torch.no_grad():
        p_TV = model(input_ids=ids).logits[0].double().softmax(dim=-1)
        q_TV = base(input_ids=ids).logits[0].double().softmax(dim=-1)
    forward, reverse = [], []
    for position in range(rendered.response_start, len(rendered.ids))[:max_positions]:
        p_V, q_V = p_TV[position - 1], q_TV[position - 1]
        forward.append(float((p_V * (p_V / q_V).log()).sum()))
        reverse.append(float((q_V * (q_V / p_V).log()).sum()))
    return forward, reverse


def profiles(model: Any, base: Any, items: Any = ITEMS, **settings: Any) -> dict[str, KlProfile]:
    settings = {"vocab_size": 97, "max_positions": 8, **settings}
    found = list(kl_profiles(model, base, items, **settings))
    assert len({profile.prompt_id for profile in found}) == len(found)
    return {profile.prompt_id: profile for profile in found}


def assert_textbook(found: dict[str, KlProfile], model: Any, base: Any, max_positions: int = 8) -> None:
    assert set(found) == {name for name, _ in ITEMS}
    for name, rendered in ITEMS:
        forward, reverse = textbook_kl(model, base, rendered, max_positions)
        assert found[name].forward == pytest.approx(forward, rel=2e-4, abs=1e-5)
        assert found[name].reverse == pytest.approx(reverse, rel=2e-4, abs=1e-5)


@pytest.fixture
def sources_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Which of the two ways to the logits was taken."""
    used: set[str] = set()

    def noting(name: str) -> None:
        original = getattr(heads, name)

        def noted(*args: Any) -> Any:
            used.add(name)
            return original(*args)

        monkeypatch.setattr(heads, name, noted)

    noting("_head_source")
    noting("_full_source")
    return used


def test_kl_by_hand() -> None:
    """D((1/2, 1/4, 1/4) || (1/4, 1/4, 1/2)) = ln(2)/4 both ways; D((3/4, 1/4) || (1/2, 1/2)) = 0.130812."""
    forward, reverse = kl_by_slices(source(logits_of([0.5, 0.25, 0.25])), source(logits_of([0.25, 0.25, 0.5])), 3)
    assert forward.tolist() == pytest.approx([math.log(2) / 4])
    assert reverse.tolist() == pytest.approx([math.log(2) / 4])
    forward, reverse = kl_by_slices(source(logits_of([0.75, 0.25])), source(logits_of([0.5, 0.5])), 2)
    assert forward.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    assert reverse.tolist() == pytest.approx([0.5 * math.log(1 / 1.5) + 0.5 * math.log(2)])


def test_logits_need_no_normalising() -> None:
    ours = logits_of([0.75, 0.25], [0.5, 0.5]) + torch.tensor([[30.0], [-7.0]])
    forward, _ = kl_by_slices(source(ours), source(logits_of([0.5, 0.5], [0.5, 0.5]) + 100), 2)
    assert forward.tolist() == pytest.approx([0.130812, 0.0], abs=2e-5)


def test_ruled_out_entries() -> None:
    """0 ln 0 = 0; what only the other rules out is infinitely far; and everything ruled out is unknown."""
    both = kl_by_slices(source(logits_of([0.5, 0.5, 0.0])), source(logits_of([0.75, 0.25, 0.0])), 3)
    assert both[0].tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2)])
    assert both[1].tolist() == pytest.approx([0.130812], abs=1e-6)
    one = kl_by_slices(source(logits_of([0.5, 0.5, 0.0])), source(logits_of([0.5, 0.25, 0.25])), 3)
    assert one[0].tolist() == pytest.approx([0.5 * math.log(2)])
    assert one[1].tolist() == [INF]
    nothing = kl_by_slices(source(torch.full((1, 3), -INF)), source(logits_of([0.5, 0.25, 0.25])), 3)
    assert nothing[0].isnan().all()


@pytest.mark.parametrize("slice_size", [1, 7, 96, 97, 98, 8192])
def test_the_slices_do_not_matter(slice_size: int) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 97) * 4, torch.randn(5, 97) * 4
    ours[2, 40:] = -INF
    theirs[2, 40:] = -INF
    p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    reverse_expected = torch.where(q > 0, q * (q.log() - p.log()), 0.0).sum(-1)
    forward, reverse = kl_by_slices(source(ours), source(theirs), 97, slice_size)
    assert torch.allclose(forward, expected, rtol=1e-5)
    assert torch.allclose(reverse, reverse_expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "config", "way"),
    [
        ("llama", {}, "_head_source"),
        ("llama", {"tie_word_embeddings": True}, "_head_source"),
        ("gpt2", {"tie_word_embeddings": True}, "_head_source"),
        ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 6}, "_head_source"),
        ("cohere", {"logit_scale": 0.25}, "_head_source"),
        ("granite", {"logits_scaling": 4.0}, "_head_source"),
        ("phi", {}, "_head_source"),
        ("mixtral", {"num_local_experts": 4}, "_head_source"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "_head_source"),
        ("rwkv", {"attention_hidden_size": 32}, "_head_source"),
        # This class caps its logits by an attribute of another name, and that one gives no body of its own.
        ("recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 3.0}, "_full_source"),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 48}, "_full_source"),
    ],
)
def test_equals_the_textbook(
    model_type: str, config: dict[str, Any], way: str, random_model: Callable[..., Any], sources_used: set[str]
) -> None:
    model, base = random_model(model_type, seed=0, **config), random_model(model_type, seed=1, **config)
    if model_type == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    assert_textbook(profiles(model, base, batch=4), model, base)
    assert sources_used == {way}


def test_models_of_two_architectures_can_be_compared(random_model: Callable[..., Any]) -> None:
    model, base = random_model("qwen3"), random_model("gpt2")
    assert_textbook(profiles(model, base), model, base)


def test_an_unknown_change_of_the_logits_is_found_out(random_model: Callable[..., Any], sources_used: set[str]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 0.9))
    assert_textbook(profiles(model, base), model, base)
    assert sources_used == {"_head_source", "_full_source"}


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_neither_batch_nor_padding_nor_order_matters(batch: int, random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    reference = profiles(model, base)
    for items in (ITEMS, ITEMS[::-1], ITEMS[2:4]):
        for name, profile in profiles(model, base, items, batch=batch).items():
            assert profile.forward == pytest.approx(reference[name].forward, abs=1e-5)


def test_every_position_of_a_short_answer_and_no_more(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    counts = {name: len(profile.forward) for name, profile in profiles(model, base).items()}
    assert counts == {"p0": 8, "p1": 3, "p2": 6, "p3": 8, "p4": 1, "p5": 8}
    assert all(len(one.reverse) == counts[name] for name, one in profiles(model, base).items())
    long = profiles(model, base, max_positions=100)
    assert len(long["p3"].forward) == 20
    assert_textbook(long, model, base, max_positions=100)


def test_a_position_does_not_see_its_own_token_or_any_later_one(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    rendered = ITEMS[0][1]
    changed = dataclasses.replace(rendered, ids=(*rendered.ids[:9], 3, 3, 3, 3, 3))
    before, after = profiles(model, base, [("x", rendered)])["x"], profiles(model, base, [("x", changed)])["x"]
    assert after.forward[:5] == pytest.approx(before.forward[:5], abs=1e-5)
    assert after.forward[5] != pytest.approx(before.forward[5], abs=1e-3)


def test_nothing_to_compare_gives_nothing(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    assert profiles(model, model, []) == {}
    assert profiles(model, model, [("empty", conversation(4, 0, 0))]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_and_itself_are_exactly_alike(dtype: torch.dtype, random_model: Callable[..., Any]) -> None:
    model = random_model("llama").to(dtype)
    found = profiles(model, random_model("llama").to(dtype))
    assert all(set(profile.forward) | set(profile.reverse) == {0.0} for profile in found.values())


def test_low_precision_is_near_the_textbook_of_the_same_weights(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama").bfloat16(), random_model("llama", seed=1).bfloat16()
    found = profiles(model, base)
    for name, rendered in ITEMS:
        expected = textbook_kl(model.float(), base.float(), rendered, 8)[0]
        model.bfloat16()
        base.bfloat16()
        assert found[name].forward == pytest.approx(expected, rel=0.15, abs=0.05)


def test_non_finite_values_are_none_and_leave_the_others_alone(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    reference = profiles(model, base)
    poison = ITEMS[3][1].ids[10]

    def spoil(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state[kwargs["input_ids"] == poison] = float("nan")
        return output

    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    num_unknown = 0
    for name, profile in profiles(model, base).items():
        rendered = dict(ITEMS)[name]
        before = rendered.ids[rendered.response_start - 1 :]
        for position, value in enumerate(profile.forward):
            unknown = before[position] == poison
            num_unknown += unknown
            assert value == (None if unknown else pytest.approx(reference[name].forward[position], abs=1e-5))
            assert (profile.reverse[position] is None) == unknown
    assert num_unknown > 0
    assert profiles(model, base)["p3"].forward[4] is None


def test_a_model_that_is_nan_everywhere_is_unknown_everywhere(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = profiles(model, base)
    assert len(found) == len(ITEMS)
    assert all(set(profile.forward) | set(profile.reverse) == {None} for profile in found.values())


def test_entries_that_one_model_rules_out(random_model: Callable[..., Any]) -> None:
    """The model rules out tokens that the base does not: D(model || base) is finite, the reverse is not."""
    model, base = random_model("llama"), random_model("llama", seed=1)

    def rule_out(module: Any, args: Any, output: Any) -> Any:
        output.logits[..., 50:] = -INF
        return output

    model.register_forward_hook(rule_out)
    found = profiles(model, base)
    expected = textbook_kl_where_possible(model, base, ITEMS[0][1])
    assert found["p0"].forward == pytest.approx(expected, rel=1e-3)
    assert set(found["p0"].reverse) == {None}


def textbook_kl_where_possible(model: Any, base: Any, rendered: Rendered) -> list[float]:
    ids = torch.tensor([rendered.ids])
    with torch.no_grad():
        p_TV = model(input_ids=ids).logits[0].double().softmax(dim=-1)[:, :50]
        q_TV = base(input_ids=ids).logits[0].double().softmax(dim=-1)[:, :50]
    kl_T = (p_TV * (p_TV / q_TV).log()).sum(dim=-1)
    first = rendered.response_start - 1
    return [float(value) for value in kl_T[first : first + 8]]


def test_dropout_is_off_and_the_models_are_given_back(random_model: Callable[..., Any]) -> None:
    model, base = (random_model("llama", seed=seed, attention_dropout=0.5) for seed in (0, 1))
    reference = profiles(model, base)
    model.train()
    assert profiles(model, base) == reference
    assert model.training
    assert not base.training


def test_inference_mode_does_not_reach_the_caller(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    for _ in kl_profiles(model, base, ITEMS, vocab_size=97, max_positions=4, batch=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_equal_vocabularies(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = from_objects(tiny_llama(), tiny_tokenizer, name="target")
    base = from_objects(tiny_llama(seed=1), tiny_tokenizer, name="base")
    assert check_vocabularies(model, base) == 400


def test_other_vocabularies_are_refused(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = from_objects(tiny_llama(vocab_size=410), tiny_tokenizer, name="target")
    other = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        bos_token=tiny_tokenizer.bos_token,
        eos_token=tiny_tokenizer.eos_token,
        chat_template=tiny_tokenizer.chat_template,
    )
    other.add_tokens(["<extra>"])
    base = from_objects(tiny_llama(seed=1, vocab_size=410), other, name="base")
    with pytest.raises(UserError, match=r"^target and base have different vocabularies .*'<extra>'.*[^\n]+$"):
        check_vocabularies(model, base)


def test_padded_embedding_rows_are_left_out(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """408 rows against 400: what neither tokenizer names cannot count, however likely the wider model finds it."""
    wide, narrow = tiny_llama(vocab_size=408), tiny_llama(seed=1)
    with torch.no_grad():
        wide.lm_head.weight[400:] = wide.lm_head.weight[:8] * 10
    size = check_vocabularies(
        from_objects(wide, tiny_tokenizer, name="target"), from_objects(narrow, tiny_tokenizer, name="base")
    )
    assert size == 400
    rendered = conversation(5, 4, seed=0)
    (found,) = kl_profiles(wide, narrow, [("x", rendered)], vocab_size=size, max_positions=8)
    with torch.no_grad():
        p_TV = wide(input_ids=torch.tensor([rendered.ids])).logits[0, :, :400].double().softmax(dim=-1)
        q_TV = narrow(input_ids=torch.tensor([rendered.ids])).logits[0].double().softmax(dim=-1)
    expected = (p_TV * (p_TV / q_TV).log()).sum(dim=-1)[4:8]
    assert found.forward == pytest.approx(expected.tolist(), rel=2e-4)


@pytest.mark.parametrize("most_rows", [1, 2, 4])
def test_out_of_memory_halves_the_batch(most_rows: int, random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    expected = profiles(model, base)
    run_out_of_memory(base, lambda ids_BT: len(ids_BT) > most_rows)
    for name, profile in profiles(model, base).items():
        assert profile.forward == pytest.approx(expected[name].forward, rel=1e-4, abs=1e-6)


def test_a_sequence_that_does_not_fit_alone_is_unknown(random_model: Callable[..., Any]) -> None:
    model, base = random_model("llama"), random_model("llama", seed=1)
    expected = profiles(model, base)
    longest = max(len(rendered.ids[: rendered.response_start + 8]) for _, rendered in ITEMS)
    run_out_of_memory(model, lambda ids_BT: ids_BT.shape[1] >= longest)
    found = profiles(model, base)
    assert found["p5"].forward == found["p5"].reverse == (None,) * 8
    assert found["p0"].forward == pytest.approx(expected["p0"].forward, rel=1e-4, abs=1e-6)
