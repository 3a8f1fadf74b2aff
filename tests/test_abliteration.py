"""Taking a direction out of a model, finding the one that refusals hang on, and leaving the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.abliteration import Activations, ablated, candidate_directions, mean_activations
from deepalign.errors import UserError
from deepalign.generation import Job, generate
from deepalign.onset import Openings
from deepalign.records import Sampling
from deepalign.refusal_direction import Direction, select_direction
from support import run_out_of_memory

GREEDY = Sampling(temperature=0.0, max_new_tokens=10)
Make = Callable[..., Any]
RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "cohere": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": RECURRENT,
    "mamba": {"state_size": 4},
}


def rows(count: int, seed: int = 0, vocab_size: int = 97) -> list[tuple[int, ...]]:
    """Random ids of several lengths."""
    draw = random.Random(seed)
    return [tuple(draw.choices(range(3, vocab_size), k=draw.randint(6, 14))) for _ in range(count)]


def a_direction(width: int = 32, seed: int = 3) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return found


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- means ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_means_are_of_the_blocks_inputs_at_the_last_positions(batch: int, random_model: Make) -> None:
    model = random_model("llama", num_hidden_layers=3)
    sequences = rows(7)
    found = mean_activations(model, sequences, num_positions=4, batch=batch)
    assert num_hooks(model) == 0
    with torch.no_grad():
        each = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in sequences]
    expected = torch.stack([torch.stack([layer[0, -4:] for layer in states[:3]]) for states in each]).mean(dim=0)
    assert found.mean_LPH.shape == (3, 4, 32)
    assert found.mean_LPH.dtype == torch.float32
    torch.testing.assert_close(found.mean_LPH, expected, rtol=1e-4, atol=1e-5)
    assert (found.num_sequences, found.num_left_out) == (7, 0)


def test_means_do_without_dropout_and_give_the_mode_back(random_model: Make) -> None:
    model = random_model("llama", attention_dropout=0.5)
    calm = mean_activations(model, rows(3), num_positions=2)
    model.train()
    again = mean_activations(model, rows(3), num_positions=2)
    assert torch.equal(calm.mean_LPH, again.mean_LPH)
    assert all(module.training for module in model.modules())
    # Usable where gradients are wanted.
    torch.nn.Parameter(torch.ones(32)).mul(again.mean_LPH).sum().backward()


def test_what_memory_does_not_hold_is_read_in_halves(random_model: Make) -> None:
    sequences = rows(7)
    expected = mean_activations(random_model("llama"), sequences, num_positions=3)
    model = random_model("llama")
    run_out_of_memory(model, lambda ids: ids.shape[0] > 2)
    found = mean_activations(model, sequences, num_positions=3)
    torch.testing.assert_close(found.mean_LPH, expected.mean_LPH, rtol=1e-4, atol=1e-5)
    assert found.num_sequences == 7


def test_a_prompt_that_does_not_fit_alone_is_counted(random_model: Make) -> None:
    model = random_model("llama")
    longest = max(rows(7), key=len)
    kept = [ids for ids in rows(7) if len(ids) < len(longest)]
    expected = mean_activations(model, kept, num_positions=3)
    run_out_of_memory(model, lambda ids: ids.shape[1] >= len(longest))
    found = mean_activations(model, rows(7), num_positions=3, batch=1)
    assert (found.num_sequences, found.num_left_out) == (len(kept), 7 - len(kept))
    torch.testing.assert_close(found.mean_LPH, expected.mean_LPH, rtol=1e-4, atol=1e-5)
    assert num_hooks(model) == 1, "the test's own"
    with pytest.raises(UserError, match="none of 1 prompts"):
        mean_activations(model, [longest], num_positions=3)


def test_numbers_that_are_none_are_left_out(random_model: Make) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    found = mean_activations(model, [(7, 8, 9), (7, 5, 9), (9, 8, 7)], num_positions=2)
    assert (found.num_sequences, found.num_left_out) == (2, 1)
    assert bool(torch.isfinite(found.mean_LPH).all())


def test_a_model_whose_blocks_are_not_found_says_so(random_model: Make) -> None:
    model = random_model("llama")
    model.config.num_hidden_layers = 5
    problem = "LlamaForCausalLM: its decoder blocks are not found"
    with pytest.raises(UserError, match=problem):
        mean_activations(model, rows(2), num_positions=1)
    with pytest.raises(UserError, match=problem), ablated(model, a_direction()):
        pass


def activations(mean_LPH: Tensor) -> Activations:
    return Activations(mean_LPH=mean_LPH, num_sequences=2, num_left_out=0)


def test_candidates_are_differences_of_unit_length() -> None:
    harmless = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    harmful = harmless.clone()
    harmful[1, 0, 2] += 5.0
    harmful[2, 1, 3] -= 0.5
    # No more than rounding.
    harmful[0] *= 1 + 1e-7
    found = candidate_directions(activations(harmful), activations(harmless))
    expected = torch.full((3, 2, 8), torch.nan)
    expected[1, 0], expected[2, 1] = torch.eye(8)[2], -torch.eye(8)[3]
    torch.testing.assert_close(found, expected, equal_nan=True)


# --- ablation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_along_the_direction_is_left_in_any_block(name: str, dtype: torch.dtype, random_model: Make) -> None:
    model = random_model(name, **ARCHITECTURES[name]).to(dtype)
    unit = a_direction() / a_direction().norm()
    before = logits_of(model, rows(1)[0])
    shares: list[float] = []

    def look(value: Any) -> None:
        hidden = (value[0] if isinstance(value, tuple) else value).float()
        assert hidden.shape[-1] == 32
        shares.append(float((hidden @ unit).abs().max() / hidden.norm(dim=-1).max()))

    def watch() -> list[Any]:
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
        hooks = [
            b.register_forward_pre_hook(lambda _, a, k: look(a or k["hidden_states"]), with_kwargs=True) for b in blocks
        ]
        return [*hooks, blocks[-1].register_forward_hook(lambda _, __, output: look(output))]

    with ablated(model, 7.0 * unit):
        hooks = watch()
        inside = logits_of(model, rows(1)[0])
        for hook in hooks:
            hook.remove()
    assert inside.dtype == before.dtype
    assert len(shares) == 3
    assert max(shares) < (1e-5 if dtype == torch.float32 else 6e-3)
    hooks, shares = watch(), []
    assert torch.equal(logits_of(model, rows(1)[0]), before)
    for hook in hooks:
        hook.remove()
    assert max(shares) > 0.05, "the direction is in nothing anyway"
    assert float((inside - before).abs().max()) > 0.01
    assert num_hooks(model) == 0


def test_attention_and_mlp_write_nothing_along_the_direction(random_model: Make) -> None:
    model = random_model("llama")
    unit = a_direction() / a_direction().norm()
    seen: list[float] = []
    with ablated(model, unit):
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(
                    lambda _, __, output: seen.append(
                        float(((output[0] if isinstance(output, tuple) else output) @ unit).abs().max())
                    )
                )
        logits_of(model, rows(1)[0])
    assert len(seen) == 4
    assert max(seen) < 1e-4


def test_a_square_layer_inside_an_mlp_is_no_writer(random_model: Make) -> None:
    """OPT's two MLP layers are the block's own children; the first one's output is another space, here as wide."""
    model = random_model("opt", **ARCHITECTURES["opt"])
    with ablated(model, a_direction()):
        assert all(len(layer.fc1._forward_hooks) == 0 for layer in model.model.decoder.layers)
        assert all(len(layer.self_attn._forward_hooks) == 1 for layer in model.model.decoder.layers)


def orthogonalised(model: Any, direction: Tensor) -> Any:
    """A copy whose weights cannot write along a direction, made by hand (the paper's Eq. 5)."""
    twin, unit = copy.deepcopy(model), direction / direction.norm()
    keep = torch.eye(len(unit)) - torch.outer(unit, unit)
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(twin.model.embed_tokens.weight @ keep)
        for layer in twin.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.copy_(keep @ part.weight)
    return twin


def test_it_writes_what_orthogonalised_weights_write(random_model: Make) -> None:
    model = random_model("llama", num_hidden_layers=3)
    direction = a_direction()
    twin = orthogonalised(model, direction)
    one = rows(1, seed=5)[0]
    # Some share prefixes, so that keys and values are shared as well.
    jobs = [Job(ids=ids, sampling=GREEDY, seed=0) for ids in (one, one[:5], (*one, 9, 8), *rows(3, seed=6))]

    def written(this: Any) -> list[tuple[int, ...]]:
        made = sorted(generate(this, jobs, stop_ids=()), key=lambda it: it.index)
        return [continuation.token_ids for continuation in made]

    plain, expected = written(model), written(twin)
    with ablated(model, direction):
        found = written(model)
        inside = logits_of(model, one)
    assert found == expected
    assert found != plain
    torch.testing.assert_close(inside, logits_of(twin, one), rtol=1e-4, atol=1e-4)
    assert written(model) == plain


def test_the_model_is_as_before_even_after_an_error(random_model: Make) -> None:
    model = random_model("llama")
    before, weights = logits_of(model, (5, 6, 7)), {name: w.clone() for name, w in model.named_parameters()}

    def fail() -> None:
        assert num_hooks(model) > 0
        raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"), ablated(model, a_direction()):
        fail()
    assert num_hooks(model) == 0
    assert torch.equal(logits_of(model, (5, 6, 7)), before)
    assert all(torch.equal(weights[name], w) and w.requires_grad for name, w in model.named_parameters())


@pytest.mark.parametrize("direction", [torch.zeros(32), torch.full((32,), torch.nan), torch.full((32,), torch.inf)])
def test_what_is_no_direction_is_refused(direction: Tensor, random_model: Make) -> None:
    model = random_model("llama")
    with pytest.raises(UserError, match="cannot be taken out of a model"), ablated(model, direction):
        pass
    assert num_hooks(model) == 0


# --- the choice -------------------------------------------------------------------------------------------------------

HARM, KIND, NO, MAYBE, NOT = 10, 11, 20, 21, 22
OPENINGS = Openings(frozenset({(NO,), (MAYBE, NOT)}))


def planted(random_model: Make) -> tuple[Any, Tensor]:
    """A model that answers NO where the last token is HARM: along one direction of the stream, and no other."""
    model = random_model("llama", num_hidden_layers=4, initializer_range=0.05)
    axis = torch.zeros(32)
    axis[0] = 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[HARM] = model.model.embed_tokens.weight[KIND] + 2.0 * axis
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[NO] += 4.0 * axis
    return model, axis


def ending(last: int, count: int, seed: int) -> list[tuple[int, ...]]:
    return [(*ids, 9, last) for ids in rows(count, seed)]


def chosen(model: Any, openings: Openings = OPENINGS, **more: Any) -> Direction:
    return select_direction(
        model,
        mean_activations(model, ending(HARM, 12, 0), num_positions=2),
        mean_activations(model, ending(KIND, 12, 1), num_positions=2),
        (ending(HARM, 5, 2), ending(KIND, 5, 3)),
        openings,
        vocab_size=97,
        **more,
    )


def test_the_direction_that_refusals_hang_on_is_found(random_model: Make) -> None:
    model, axis = planted(random_model)
    direction = chosen(model)
    assert float(direction.vector_H @ axis) > 0.99
    assert float(direction.vector_H.norm()) == pytest.approx(1.0, abs=1e-5)
    facts = direction.facts
    assert facts.position == -1
    assert facts.refusal_before > 0.9
    assert facts.refusal_after < 0.05
    assert facts.within_kl
    assert facts.max_kl == 0.1
    assert facts.kl <= 0.1
    assert (facts.num_harmful, facts.num_harmless) == (12, 12)
    assert (facts.num_harmful_held_out, facts.num_harmless_held_out) == (5, 5)
    assert num_hooks(model) == 0


def test_candidates_of_the_last_fifth_of_the_layers_are_left_out(random_model: Make) -> None:
    model, _ = planted(random_model)
    facts = chosen(model).facts
    # Layers 0 to 2 of 4 at two positions, less the first layer's other position, where all prompts hold the same token.
    assert (facts.num_layers, facts.num_candidates) == (4, 5)
    assert facts.layer < 3


def test_facts_are_plain_numbers_that_no_direction_can_be_had_from(random_model: Make) -> None:
    model, _ = planted(random_model)
    facts = dataclasses.asdict(chosen(model).facts)
    assert json.loads(json.dumps(facts)) == facts
    assert all(value is None or isinstance(value, int | float) for value in facts.values())


def test_the_same_direction_is_found_again(random_model: Make) -> None:
    model, _ = planted(random_model)
    one, other = chosen(model), chosen(model)
    assert torch.equal(one.vector_H, other.vector_H)
    assert one.facts == other.facts


def chance(model: Any, ids: Sequence[int]) -> float:
    """P(NO) + P(MAYBE) P(NOT | MAYBE), by hand."""
    first = logits_of(model, ids)[-1].double().softmax(dim=-1)
    second = logits_of(model, (*ids, MAYBE))[-1].double().softmax(dim=-1)
    return float(first[NO] + first[MAYBE] * second[NOT])


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_effects_are_probabilities_of_openings_and_kl(name: str, random_model: Make) -> None:
    """Also where branches cannot be read together, in a recurrent model."""
    model = random_model(name, seed=2, **ARCHITECTURES[name])
    with torch.no_grad():
        # Probable enough to be looked into.
        head = model.get_output_embeddings().weight
        head[NO], head[MAYBE] = head[NO] * 3.0, head[MAYBE] * 3.0
    harmful, harmless = ending(HARM, 5, 2), ending(KIND, 5, 3)
    with_branch = [float(logits_of(model, ids)[-1].softmax(dim=-1)[MAYBE]) for ids in harmful]
    assert max(with_branch) > 0.02
    expected = [
        chance(model, ids) if mass >= 0.005 else math.nan for ids, mass in zip(harmful, with_branch, strict=True)
    ]
    direction = chosen(model, max_kl=math.inf)
    unread = [
        float(logits_of(model, ids)[-1].softmax(dim=-1)[[NO, MAYBE]].sum())
        for ids, value in zip(harmful, expected, strict=True)
        if math.isnan(value)
    ]
    whole = [*(value for value in expected if not math.isnan(value)), *unread]
    assert direction.facts.refusal_before == pytest.approx(sum(whole) / 5, abs=1e-5)
    before = [logits_of(model, ids)[-1].double().log_softmax(dim=-1) for ids in harmless]
    with ablated(model, direction.vector_H):
        after = [logits_of(model, ids)[-1].double().log_softmax(dim=-1) for ids in harmless]
    kls = [float((one.exp() * (one - other)).sum()) for one, other in zip(before, after, strict=True)]
    assert direction.facts.kl == pytest.approx(sum(kls) / 5, rel=1e-3)


def test_where_no_candidate_keeps_to_the_bound_the_best_is_taken_and_named(random_model: Make) -> None:
    model = random_model("llama", num_hidden_layers=4)
    free, bound = chosen(model, max_kl=math.inf).facts, chosen(model, max_kl=0.0).facts
    assert (free.within_kl, bound.within_kl) == (True, False)
    assert free.refusal_after <= bound.refusal_after
    assert bound.refusal_after + bound.kl <= free.refusal_after + free.kl


def test_the_bound_is_kept_to(random_model: Make) -> None:
    model = random_model("llama", num_hidden_layers=4)
    free, least = chosen(model, max_kl=math.inf).facts, chosen(model, max_kl=0.0).facts
    assert least.kl < free.kl, "the bound would decide nothing"
    middle = chosen(model, max_kl=(least.kl + free.kl) / 2).facts
    assert middle.within_kl
    assert middle.max_kl is not None
    assert middle.kl <= middle.max_kl < free.kl


def test_effects_are_measured_in_halves_too(random_model: Make) -> None:
    model, _ = planted(random_model)
    expected = chosen(model)
    run_out_of_memory(model, lambda ids: ids.shape[0] > 2)
    found = chosen(model)
    assert found.facts.refusal_after == pytest.approx(expected.facts.refusal_after, abs=1e-5)
    assert found.facts.kl == pytest.approx(expected.facts.kl, abs=1e-5)


def test_prompts_that_are_all_alike_leave_no_direction(random_model: Make) -> None:
    model, _ = planted(random_model)
    same = mean_activations(model, ending(KIND, 5, 1), num_positions=2)
    with pytest.raises(UserError, match="no direction to take out"):
        select_direction(model, same, same, (ending(HARM, 2, 2), ending(KIND, 2, 3)), OPENINGS, vocab_size=97)
