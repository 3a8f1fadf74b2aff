"""Generation: equal to the library's own, whatever the batch; and what is done about everything that can go wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from deepalign import batching, generation
from deepalign.errors import UserError
from deepalign.generation import Continuation, Job, generate
from deepalign.records import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
HALF_LOCAL = ["sliding_attention", "full_attention"]
MAMBA_SIZES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "bloom (alibi)": ("bloom", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3 moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "mistral, window full": ("mistral", {"sliding_window": 6}),
    "mistral, window wide": ("mistral", {"sliding_window": 500}),
    "mistral, window just full": ("mistral", {"sliding_window": 20}),
    "gemma2": ("gemma2", {"sliding_window": 6, "final_logit_softcapping": 5.0, "layer_types": HALF_LOCAL}),
    "gemma3, window full": ("gemma3_text", {"sliding_window": 6, "layer_types": HALF_LOCAL}),
    "gemma3, window wide": ("gemma3_text", {"sliding_window": 200, "layer_types": HALF_LOCAL}),
    "gemma4 (layers differ in width)": (
        "gemma4_text",
        {"sliding_window": 6, "layer_types": HALF_LOCAL, "global_head_dim": 16, "vocab_size_per_layer_input": 97},
    ),
    "lfm2 (convolution)": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon-h1 (mamba beside attention)": ("falcon_h1", {"mamba_d_ssm": 32, **MAMBA_SIZES}),
    "qwen3.5 (linear attention)": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "deepseek v3.2 (chooses its keys; one row at a time)": (
        "deepseek_v32",
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
            **{"topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
            **{"v_head_dim": 8, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
        },
    ),
}


def job(ids: Sequence[int], sampling: Sampling = GREEDY, seed: int = 0) -> Job:
    return Job(ids=tuple(ids), sampling=sampling, seed=seed)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(3, 97) for _ in range(length))


def mixed_jobs() -> list[Job]:
    """Mixed lengths, prefixes of each other, duplicates, single tokens, and differing numbers of new tokens."""
    long, short = prompt(14, seed=1), prompt(9, seed=2)
    sequences = [long, long[:5], long[:9], long, prompt(3, 3), prompt(1, 4), prompt(20, 5), short, short[:4], long[:1]]
    lengths = [12, 7, 12, 12, 5, 12, 9, 12, 3, 12]
    return [
        job(ids, Sampling(temperature=0.0, max_new_tokens=length))
        for ids, length in zip(sequences, lengths, strict=True)
    ]


def run(model: Any, jobs: Sequence[Job], stop_ids: Sequence[int] = (), max_batch: int = 100) -> list[Continuation]:
    """Continuations in the order of the jobs; each must come exactly once."""
    found = list(generate(model, jobs, stop_ids=stop_ids, max_batch=max_batch))
    assert sorted(one.index for one in found) == list(range(len(jobs)))
    return sorted(found, key=lambda one: one.index)


def written(model: Any, jobs: Sequence[Job], **settings: Any) -> list[tuple[int, ...]]:
    found = run(model, jobs, **settings)
    assert {one.status for one in found} == {"ok"}
    return [one.token_ids for one in found]


def library_greedy(model: Any, one: Job) -> tuple[int, ...]:
    """What `transformers` itself writes, one sequence at a time."""
    ids = torch.tensor([one.ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=one.sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=2,
    )
    return tuple(out[0, len(one.ids) :].tolist())


def watch(model: Any, look: Callable[[torch.Tensor], None]) -> Any:
    """Call `look` with the input ids of every forward pass."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        look(kwargs["input_ids"])

    return model.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_what_transformers_writes(name: str, random_model: Callable[..., Any]) -> None:
    model_type, config = ARCHITECTURES[name]
    model = random_model(model_type, **config)
    jobs = mixed_jobs()
    expected = [library_greedy(model, one) for one in jobs]
    assert [len(ids) for ids in expected] == [one.sampling.max_new_tokens for one in jobs]
    assert len({token for ids in expected for token in ids}) > 12, "too monotonous to tell right from wrong"
    for max_batch in (1, 3, 100):
        assert written(model, jobs, max_batch=max_batch) == expected, max_batch


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mamba", {"state_size": 8}),
        ("rwkv", {"attention_hidden_size": 32}),
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3}),
        ("minimax", {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    ],
)
def test_a_model_with_a_cache_of_its_own_is_refused_by_name(
    model_type: str, config: dict[str, Any], random_model: Callable[..., Any]
) -> None:
    """These take no common cache, or pass it by in silence and would forget what came before."""
    model = random_model(model_type, **config)
    for ids in (prompt(6, 0), prompt(1, 0)):
        with pytest.raises(UserError, match=rf"^{type(model).__name__} cannot be generated with here: \S[^\n]+$"):
            list(generate(model, [job(ids)], stop_ids=()))


def sampled_jobs() -> list[Job]:
    sampling = Sampling(temperature=1.1, top_p=0.95, top_k=30, max_new_tokens=10)
    cold = Sampling(temperature=0.5, top_p=1.0, top_k=0, max_new_tokens=6)
    return [
        job(one.ids, cold if number % 3 == 0 else sampling, seed=100 + number)
        for number, one in enumerate(mixed_jobs())
    ]


def test_a_sampled_row_depends_on_its_seed_alone(random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama"), sampled_jobs()
    together = written(model, jobs)
    assert written(model, jobs) == together
    assert written(model, jobs, max_batch=1) == together
    assert written(model, jobs, max_batch=3) == together
    assert written(model, jobs[::-1]) == together[::-1]
    assert written(model, jobs[2:6]) == together[2:6]
    reseeded = written(model, [job(one.ids, one.sampling, one.seed + 1000) for one in jobs])
    assert sum(one != other for one, other in zip(together, reseeded, strict=True)) >= 8


def test_rows_of_the_same_prompt_differ_by_their_seeds(random_model: Callable[..., Any]) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=10)
    rows = written(random_model("llama"), [job(prompt(6, 0), sampling, seed) for seed in (1, 2, 3, 2)])
    assert len(set(rows)) == 3
    assert rows[1] == rows[3]


def test_a_seed_may_use_all_64_bits(random_model: Callable[..., Any]) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)
    seeds = (0, 1, 2**63, 2**64 - 1)
    assert len(set(written(random_model("llama"), [job(prompt(6, 0), sampling, seed) for seed in seeds]))) == 4


def test_more_new_tokens_only_append(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    rows = [
        written(model, [job(prompt(6, 0), Sampling(temperature=1.0, top_p=0.9, max_new_tokens=count), seed=5)])[0]
        for count in (1, 4, 15)
    ]
    assert [len(row) for row in rows] == [1, 4, 15]
    assert rows[2][:4] == rows[1]
    assert rows[1][:1] == rows[0]


def test_a_stop_token_ends_its_row_and_is_left_out(random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama"), mixed_jobs()
    free = written(model, jobs)
    stops = {free[0][4], free[6][0], free[7][-1]}
    for max_batch in (1, 100):
        for one, ids, task in zip(run(model, jobs, sorted(stops), max_batch), free, jobs, strict=True):
            cut = next((place for place, token in enumerate(ids) if token in stops), None)
            assert one.token_ids == ids[:cut]
            assert one.finish == ("length" if cut is None else "stop")
            assert len(one.token_ids) <= task.sampling.max_new_tokens
    found = run(model, jobs, sorted(stops))
    assert {one.finish for one in found} == {"stop", "length"}
    assert found[6].token_ids == ()


def test_a_job_that_does_not_fit_the_context_fails_alone(random_model: Callable[..., Any]) -> None:
    model = random_model("llama", max_position_embeddings=20)
    jobs = [job(prompt(8, 0)), job(prompt(9, 0)), job(prompt(30, 0)), job(prompt(3, 1))]
    found = run(model, jobs)
    assert [one.status for one in found] == ["ok", "failed", "failed", "ok"]
    assert found[1].reason == "9 input + 12 new tokens exceed the model's 20"
    assert found[2].token_ids == ()
    assert found[0].token_ids == library_greedy(model, jobs[0])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("most_rows", [1, 2, 5])
def test_out_of_memory_halves_the_batch(error: Exception, most_rows: int, random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama"), sampled_jobs()
    expected = written(model, jobs)

    def refuse(ids_BT: torch.Tensor) -> None:
        if len(ids_BT) > most_rows:
            raise error

    watch(model, refuse)
    assert written(model, jobs) == expected


@pytest.fixture(params=[True, False], ids=["shared", "apart"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without shared prefixes, whatever the model allows, and without the passes that find that out."""
    value: bool = request.param
    monkeypatch.setattr(generation, "shares_attention", lambda *_: value)
    return value


@pytest.mark.usefixtures("shared")
def test_out_of_memory_in_the_middle_loses_and_doubles_nothing(random_model: Callable[..., Any]) -> None:
    """Memory runs out at the fifth step, after some rows have ended and been given out."""
    model, jobs = random_model("llama"), mixed_jobs()
    expected = written(model, jobs)
    steps = []

    def refuse(ids_BT: torch.Tensor) -> None:
        steps.append(len(ids_BT))
        if len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    watch(model, refuse)
    assert written(model, jobs) == expected
    # The interrupted step had lost the row that wants three tokens, and the rest went on in two halves.
    assert steps[1] == 10
    assert steps[5] == 9
    assert max(steps[6:]) == 5


def test_out_of_memory_even_alone_fails_with_the_reason(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")

    def refuse(ids_BT: torch.Tensor) -> None:
        if len(ids_BT) > 1 or 77 in ids_BT.tolist()[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hopeless, fine = job((3, 77, 5, 6)), job(prompt(4, 1))
    expected = written(model, [fine])[0]
    watch(model, refuse)
    found = run(model, [fine, hopeless, fine])
    assert [one.status for one in found] == ["ok", "failed", "ok"]
    assert found[1].reason == "out of memory, even alone"
    assert found[0].token_ids == found[2].token_ids == expected


def test_any_other_error_of_the_model_comes_out(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")

    def refuse(ids_BT: torch.Tensor) -> None:
        raise RuntimeError("device-side assert triggered")

    watch(model, refuse)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(model, mixed_jobs())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_logits_fail_their_row_alone(poison: float, random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama"), sampled_jobs()
    expected = run(model, jobs)
    # A token that one row writes, not as its last; the row fails at the step after.
    bad = next(
        token
        for token in expected[7].token_ids[:-1]
        if sum(token in one.token_ids[:-1] or task.ids[-1] == token for one, task in zip(expected, jobs, strict=True))
        < 4
    )

    def spoil(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits[kwargs["input_ids"][:, -1] == bad, -1, 3] = poison
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    found = run(model, jobs)
    failed = [bad in one.token_ids[:-1] or task.ids[-1] == bad for one, task in zip(expected, jobs, strict=True)]
    assert failed[7]
    assert not all(failed)
    for one, before, fails in zip(found, expected, failed, strict=True):
        if fails:
            assert (one.status, one.reason) == ("failed", "the model's logits are not finite")
        else:
            assert one == before


def test_ruled_out_tokens_are_not_non_finite_logits(random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama"), sampled_jobs()

    def rule_out(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits[..., 10:] = -torch.inf
        return output

    model.register_forward_hook(rule_out, with_kwargs=True)
    rows = written(model, jobs)
    assert max(max(row) for row in rows) < 10


def random_states() -> tuple[Any, ...]:
    return (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("exhausted", [True, False])
def test_the_model_is_given_back_as_it_was(exhausted: bool, random_model: Callable[..., Any]) -> None:
    model, jobs = random_model("llama", attention_dropout=0.5), sampled_jobs()
    expected = written(model, jobs)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    states = random_states()
    continuations = generate(model, jobs, stop_ids=(), max_batch=2)
    if exhausted:
        rows = sorted(continuations, key=lambda one: one.index)
        assert [one.token_ids for one in rows] == expected, "dropout was on"
    else:
        next(continuations)
        continuations.close()  # type: ignore[attr-defined]
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert random_states() == states
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_inference_mode_does_not_reach_the_caller(random_model: Callable[..., Any]) -> None:
    def modes(rows: Iterator[Continuation]) -> Iterator[bool]:
        for _ in rows:
            yield torch.is_inference_mode_enabled() or not torch.is_grad_enabled()

    seen = list(modes(generate(random_model("llama"), mixed_jobs(), stop_ids=(), max_batch=3)))
    assert seen == [False] * 10


def test_single_tokens_and_nothing_at_all(random_model: Callable[..., Any]) -> None:
    for model_type, config in (ARCHITECTURES["llama"], ARCHITECTURES["gemma3, window full"], ARCHITECTURES["gpt2"]):
        model = random_model(model_type, **config)
        jobs = [job((5,)), job((60,)), job((5,))]
        assert written(model, jobs) == [library_greedy(model, one) for one in jobs]
        assert list(generate(model, [], stop_ids=())) == []


@pytest.mark.usefixtures("shared")
def test_prefixes_and_duplicates_share_one_forward_pass(random_model: Callable[..., Any]) -> None:
    """What prefill depths cost: the longest sequence once, and one row each from there on."""
    model = random_model("llama")
    long, other = prompt(30, 0), prompt(8, 1)
    shapes: list[tuple[int, ...]] = []
    watch(model, lambda ids_BT: shapes.append(tuple(ids_BT.shape)))
    run(model, [job(long[:k]) for k in (10, 12, 20, 30, 30)] + [job(other)])
    assert shapes[0] == (2, 29)
    assert shapes[1:] == [(6, 1)] * 12


def test_a_full_window_shares_nothing(random_model: Callable[..., Any]) -> None:
    model = random_model("mistral", sliding_window=6)
    shapes: list[tuple[int, ...]] = []
    watch(model, lambda ids_BT: shapes.append(tuple(ids_BT.shape)))
    run(model, [job(prompt(30, 0)[:k]) for k in (10, 20, 30)])
    assert shapes[0] == (3, 29)


def test_batches_stay_within_the_memory_for_keys_and_values(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Keys and values of 2 layers x 2 heads x 8 x float32, twice over: 512 bytes a token, 8 + 12 tokens a row."""
    model = random_model("llama")
    apart, alike = [job(prompt(8, seed)) for seed in range(7)], [job(prompt(8, 0), seed=seed) for seed in range(7)]
    expected = written(model, apart), written(model, alike)
    monkeypatch.setattr(batching, "_CPU_CACHE_BYTES", 512 * 20 * 3)
    rows: list[int] = []
    watch(model, lambda ids_BT: rows.append(len(ids_BT)))
    assert written(model, apart) == expected[0]
    assert max(rows) == 3
    rows.clear()
    assert written(model, alike) == expected[1]
    # Sixty tokens: one prefix and the new tokens of four rows, or three whole rows.
    assert max(rows) == (4 if shared else 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_models_own(random_model: Callable[..., Any], temperature: float) -> None:
    """Those of one plain pass over each finished row, whatever the temperature that it was drawn with."""
    model = random_model("llama")
    sampling = Sampling(temperature=temperature, top_p=0.9, top_k=5, max_new_tokens=7)
    prompts = [(3, 4, 5, 6, 7), (3, 4, 5), (9, 8, 7, 6)]
    jobs = [Job(ids=ids, sampling=sampling, seed=seed) for seed, ids in enumerate(prompts)]
    plain = {made.index: made for made in generate(model, jobs, stop_ids=[11])}
    for made in generate(model, jobs, stop_ids=[11], with_logprobs=True):
        assert made.token_ids == plain[made.index].token_ids
        assert plain[made.index].logprobs == ()
        ids = (*prompts[made.index], *made.token_ids)
        logps_TV = model(torch.tensor([ids])).logits[0].detach().log_softmax(dim=-1)
        wanted = [float(logps_TV[place - 1, ids[place]]) for place in range(len(prompts[made.index]), len(ids))]
        assert made.logprobs == pytest.approx(wanted, abs=1e-4)
