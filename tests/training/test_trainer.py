"""The trainer: the same numbers as TRL's before the first step, Eq. 3's gradient after it, and what must not matter."""

from __future__ import annotations

import itertools
from typing import Any

import by_hand
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

FORMS = ("ids", "prompt-completion", "messages", "text")
VARIANTS = list(itertools.product(("one-pass", "trl"), ("online", "precomputed")))
TEXTS = (
    ("How do I bake bread?", "Mix the flour with water, salt and yeast."),
    ("Count to three.", "One, two, three."),
    ("Open the door", "I cannot help with that request. I am sorry, but I am unable to assist with it, at all."),
    ("What is first?", "First, open the door; second, turn on the light."),
    ("Why?", "The quick brown fox."),
    ("Who are you?", "Sure, here are the steps."),
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def data(form: str, make_rows: Any) -> list[Any]:
    if form == "ids":
        return list(make_rows(6))
    if form == "prompt-completion":
        return [{"prompt": prompt + " ", "completion": completion} for prompt, completion in TEXTS]
    if form == "text":
        return [{"text": f"{prompt} {completion}"} for prompt, completion in TEXTS]
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in TEXTS
    ]
    return [{"messages": [*one, *turns[number - 1]]} for number, one in enumerate(turns)]


# --- the same as TRL's, and as each other ---------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_first_step_is_trls_and_all_variants_agree(
    form: str, packing: bool, train: Any, make_rows: Any, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.chat_template = MARKED
    settings = {
        "packing": packing,
        "max_length": 96,
        "learning_rate": 0.3,
        "per_device_train_batch_size": 1 if packing else 2,
        "assistant_only_loss": form == "messages",
    }
    rows = data(form, make_rows)
    plain = train(rows, cls=SFTTrainer, config=SFTConfig, **settings)
    runs = [train(rows, head=head, reference=reference, **settings) for head, reference in VARIANTS]
    for run in runs:
        assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
        assert run.logged("constraint/weight_first")[0] == pytest.approx(1.0, abs=1e-5)
        for name in ("loss", "constraint/objective", "constraint/weight_early", "entropy", "mean_token_accuracy"):
            assert run.logged(name) == pytest.approx(runs[0].logged(name), rel=1e-3, abs=1e-5), name
        assert run.distance(runs[0]) < 1e-4
    assert runs[0].losses[1:] != pytest.approx(plain.losses[1:], rel=1e-4)
    assert runs[0].distance(plain) > 1e-3


@pytest.mark.parametrize("head", ["one-pass", "trl"])
@pytest.mark.parametrize("adapter", [False, True])
def test_without_the_constraint_it_is_trls_trainer(
    adapter: bool, head: str, train: Any, make_rows: Any, lora: Any
) -> None:
    peft = {"peft_config": lora()} if adapter else {}
    rows = make_rows(6)
    plain = train(rows, cls=SFTTrainer, config=SFTConfig, **peft)
    run = train(rows, objective="sft", head=head, **peft)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert run.distance(plain) < 1e-5
    assert run.logged("num_tokens") == plain.logged("num_tokens")
    assert not run.logged("constraint/objective")


def test_a_lora_run_begins_as_trls_and_its_variants_agree(train: Any, make_rows: Any, lora: Any) -> None:
    rows = make_rows(6)
    settings = {"learning_rate": 1.0, "peft_config": lora()}
    plain = train(rows, cls=SFTTrainer, config=SFTConfig, **settings)
    runs = [train(rows, head=head, reference=reference, **settings) for head, reference in VARIANTS]
    assert runs[0].losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert runs[0].distance(plain) > 1e-3
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-4)
        assert run.distance(runs[0]) < 1e-4


@pytest.mark.parametrize("model_type", ["hyperclovax", "mixtral"])
def test_where_one_pass_is_not_possible_trls_head_trains(
    model_type: str, random_model: Any, train: Any, make_rows: Any, make_trainer: Any
) -> None:
    """HyperCLOVA X's scale is another than it says; a mixture of experts has a loss of its own beside."""
    config = {"logits_scaling": 2.0} if model_type == "hyperclovax" else {"router_aux_loss_coef": 0.01}
    rows = [{name: [max(-100, one) % 97 if one >= 0 else one for one in row[name]] for name in row}
            for row in make_rows(6)]  # fmt: skip
    plain = train(rows, model=random_model(model_type, **config), cls=SFTTrainer, config=SFTConfig)
    run = train(rows, model=random_model(model_type, **config), learning_rate=0.2)
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert run.losses[2] != pytest.approx(plain.losses[2], rel=1e-5)
    with pytest.raises(ValueError, match="head='one-pass' does not give"):
        make_trainer(rows, model=random_model(model_type, **config), head="one-pass")


@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_prompt_tuning_trains(reference: str, train: Any, make_rows: Any) -> None:
    """Virtual tokens stand before the rows."""
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = make_rows(4)
    plain = train(rows, cls=SFTTrainer, config=SFTConfig, peft_config=peft)
    run = train(rows, peft_config=peft, reference=reference, learning_rate=5.0)
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert run.logged("constraint/log_ratio")[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(run.logged("constraint/log_ratio")[2]) > 1e-4


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["one-pass", "trl"])
@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_a_step_is_along_the_gradient_of_equation_3(
    head: str, reference: str, train: Any, make_rows: Any, tiny_llama: Any
) -> None:
    """From the weights after two steps, the third is -lr times autograd's gradient of Eq. 3 written out."""
    rows, rate = make_rows(4, answer=(3, 12)), 0.5
    settings = {"head": head, "reference": reference, "learning_rate": rate, "per_device_train_batch_size": 4}
    two, three = (train(rows, max_steps=steps, **settings) for steps in (2, 3))
    model, start = two.trainer.model.eval(), tiny_llama()
    loss = by_hand.eq3_loss(model, start, rows)
    assert three.logged("constraint/objective")[2] == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = two.trainer.model.named_parameters()
    names, weights = zip(*wanted, strict=True)
    for name, weight, grad in zip(names, weights, torch.autograd.grad(loss, weights), strict=True):
        step = three.weights[name] - weight.detach()
        torch.testing.assert_close(step, -rate * grad, rtol=2e-3, atol=2e-4 * float(step.abs().max()), msg=name)


def test_the_loss_is_cross_entropy_weighted_by_equation_5(train: Any, make_rows: Any, tiny_llama: Any) -> None:
    rows = make_rows(4, answer=(3, 12))
    settings = {"learning_rate": 0.5, "per_device_train_batch_size": 4}
    two, three = (train(rows, max_steps=steps, **settings) for steps in (2, 3))
    by_span: dict[str, list[float]] = {"first": [], "early": [], "rest": []}
    total = 0.0
    for row in rows:
        with torch.no_grad():
            now, before = by_hand.log_probs(two.trainer.model.eval(), row), by_hand.log_probs(tiny_llama(), row)
        for place, position in by_hand.responses(row):
            weight = by_hand.weight(float(now[place]), float(before[place]), by_hand.beta(position))
            by_span["first" if position == 0 else "early" if position < 5 else "rest"].append(weight)
            total -= weight * float(now[place])
    assert three.losses[2] == pytest.approx(total / by_hand.num_tokens(rows), rel=1e-4)
    for span, weights in by_span.items():
        found = three.logged(f"constraint/weight_{span}")[2]
        assert found == pytest.approx(sum(weights) / len(weights), rel=1e-4)
        assert found < 1.0


def test_more_strength_moves_the_answer_less(train: Any, make_rows: Any) -> None:
    rows = make_rows(4, answer=(5, 5))
    settings = {"learning_rate": 0.3, "max_steps": 8, "per_device_train_batch_size": 4}
    weak, paper, strong = (
        train(rows, beta_first=beta, beta_early=beta, beta_rest=beta, **settings).logged("constraint/log_ratio")[-1]
        for beta in (1e-6, 0.5, 10.0)
    )
    assert weak > paper > strong > 0.0


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("head", ["one-pass", "trl"])
def test_accumulation_does_not_matter(head: str, reduction: str, train: Any, make_rows: Any) -> None:
    """Rows of unequal lengths: 4 at once, 2 by 2, or one by one."""
    settings = {"head": head, "reduction": reduction, "learning_rate": 0.2, "max_steps": 2}
    runs = [
        train(make_rows(8), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **settings)
        for size in (4, 2, 1)
    ]
    for run in runs[1:]:
        for name in ("loss", "constraint/objective", "constraint/log_ratio", "constraint/weight_rest"):
            assert run.logged(name) == pytest.approx(runs[0].logged(name), rel=1e-4, abs=1e-5), name
        assert run.distance(runs[0]) < 1e-4


def test_nor_does_it_where_a_model_counts_no_tokens_itself(train: Any, make_rows: Any, tiny_llama: Any) -> None:
    """Gemma 3n and 4 say that their own loss takes no number of tokens; the trainer's is none of theirs."""
    runs = []
    for size in (4, 1):
        model = tiny_llama()
        model.accepts_loss_kwargs = False
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(train(make_rows(8), model=model, learning_rate=0.2, max_steps=2, **steps))
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    assert runs[1].distance(runs[0]) < 1e-4


@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_packing_does_not_matter(reference: str, train: Any, make_rows: Any) -> None:
    """All rows in one packed row: each is read alone, and its response positions begin anew."""
    settings = {"reference": reference, "learning_rate": 0.2, "gradient_checkpointing": True}
    rows = make_rows(5)
    padded = train(rows, per_device_train_batch_size=5, **settings)
    for others in ({}, {"pad_to_multiple_of": 32}):
        packed = train(rows, per_device_train_batch_size=1, packing=True, max_length=256, **others, **settings)
        assert len(packed.trainer.train_dataset) == 1
        for name in ("loss", "constraint/objective", "constraint/weight_first", "constraint/weight_rest"):
            assert packed.logged(name) == pytest.approx(padded.logged(name), rel=1e-4), name
        assert packed.distance(padded) < 1e-4


def padding_left(examples: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(example["input_ids"]) for example in examples)
    fills = [width - len(example["input_ids"]) for example in examples]
    pairs = list(zip(fills, examples, strict=True))
    return {
        "input_ids": torch.tensor([[3] * fill + example["input_ids"] for fill, example in pairs]),
        "labels": torch.tensor([[-100] * fill + example["labels"] for fill, example in pairs]),
        "attention_mask": torch.tensor([[0] * fill + [1] * len(example["input_ids"]) for fill, example in pairs]),
    }


@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_the_side_of_the_padding_does_not_matter(
    reference: str, train: Any, make_rows: Any, tiny_tokenizer: Any
) -> None:
    settings = {"reference": reference, "learning_rate": 0.2, "per_device_train_batch_size": 4}
    rows = make_rows(4)
    right, left = train(rows, **settings), train(rows, data_collator=padding_left, **settings)
    tiny_tokenizer.padding_side = "left"
    told = train(rows, **settings)
    for run in (left, told):
        assert run.losses == pytest.approx(right.losses, rel=1e-4)
        assert run.logged("constraint/objective") == pytest.approx(right.logged("constraint/objective"), rel=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("head", ["one-pass", "trl"])
def test_gradient_checkpointing_does_not_matter(
    head: str, adapter: bool, train: Any, make_rows: Any, lora: Any
) -> None:
    peft = {"peft_config": lora()} if adapter else {}
    settings = {"head": head, "reference": "online", "learning_rate": 0.2, **peft}
    without, with_it = (train(make_rows(6), gradient_checkpointing=on, **settings) for on in (False, True))
    assert with_it.losses == pytest.approx(without.losses, rel=1e-5)
    assert with_it.distance(without) < 1e-5


def test_a_stream_is_read_at_each_step(train: Any, make_rows: Any, make_trainer: Any) -> None:
    rows = make_rows(6)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    settings = {"learning_rate": 0.2}
    found = train(stream, **settings)
    assert found.losses == pytest.approx(train(rows, train_sampling_strategy="sequential", **settings).losses, rel=1e-5)
    with pytest.raises(ValueError, match="a stream cannot be read beforehand"):
        make_trainer(stream, reference="precomputed")


# --- what the loss is divided by ------------------------------------------------------------------------------------

TURNS = [
    {"input_ids": list(range(10, 24)), "labels": [-100] * 3 + [13, 14] + [-100] * 3 + list(range(18, 24))},
    {"input_ids": list(range(40, 48)), "labels": [-100] * 2 + list(range(42, 48))},
    {"input_ids": [50, 51, 52], "labels": [-100, -100, 52]},
    {"input_ids": [60, 61, 62, 63], "labels": [60, 61, 62, -100]},
]


def reduced(model: Any, rows: list[Any], reduction: str) -> float:
    """Mean over tokens, or over answers of their sums or means."""
    with torch.no_grad():
        pairs = [(by_hand.log_probs(model, row), turn) for row in rows for turn in by_hand.turns(row)]
    answers = [[-float(logps[place]) for place in turn] for logps, turn in pairs]
    sums = [sum(answer) for answer in answers]
    if reduction == "token":
        return sum(sums) / sum(len(answer) for answer in answers)
    means = [sum(answer) / (len(answer) if reduction == "sequence_mean" else 1) for answer in answers]
    return sum(means) / len(means)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("reduction", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("packing", [False, True])
def test_reductions_are_over_tokens_or_over_answers(
    packing: bool, reduction: str, accumulation: int, train: Any, tiny_llama: Any
) -> None:
    """A row of two answers counts twice, a label on a row's first token not at all; in evaluation as in training."""
    steps = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    if packing:
        steps = {"per_device_train_batch_size": 1, "packing": True, "max_length": 256}
    run = train(TURNS, max_steps=1, reduction=reduction, eval_dataset=TURNS, learning_rate=0.0, **steps)
    expected = reduced(tiny_llama(), TURNS, reduction)
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def grouped(rows: list[Any]) -> list[Any]:
    """Groups of tokens that cut across rows and answers; group 2 in one row only."""
    out = []
    for number, row in enumerate(rows):
        groups = [2 if number == 1 and place % 4 == 3 else (place + number) % 2 for place in range(len(row["labels"]))]
        out.append({**row, "groups": groups})
    return out


def grouped_loss(model: Any, rows: list[Any], weights: list[float]) -> torch.Tensor:
    """Sum over groups of the weight times the mean over the group's tokens, with gradient."""
    terms: list[list[torch.Tensor]] = [[] for _ in weights]
    for row in rows:
        logps = by_hand.log_probs(model, row)
        for place, _ in by_hand.responses(row):
            terms[row["groups"][place + 1]].append(-logps[place])
    means = [weight * torch.stack(terms[group]).mean() for group, weight in enumerate(weights) if terms[group]]
    return torch.stack(means).sum()


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("head", ["one-pass", "trl"])
def test_groups_weigh_by_their_own_means(head: str, size: int, train: Any, make_rows: Any, tiny_llama: Any) -> None:
    """Also over accumulation steps, and where a group has no token at all."""
    rows, weights = grouped(make_rows(4)), [0.2, 0.7, 3.0, 5.0]
    steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    run = train(rows, head=head, group_weights=weights, max_steps=1, learning_rate=0.5, **steps)
    model = tiny_llama()
    loss = grouped_loss(model, rows, weights)
    assert run.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, weight, grad in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
        step = run.weights[name] - weight.detach()
        torch.testing.assert_close(step, -0.5 * grad, rtol=2e-3, atol=2e-4 * float(step.abs().max()), msg=name)


def test_groups_of_cut_rows_stay_beside_their_tokens(train: Any, make_rows: Any, tiny_llama: Any) -> None:
    rows, weights = grouped(make_rows(4, answer=(8, 12))), [0.2, 0.7, 3.0]
    for mode, part in (("keep_start", slice(9)), ("keep_end", slice(-9, None))):
        cut = [{name: values[part] for name, values in row.items()} for row in rows]
        settings = {"group_weights": weights, "max_steps": 1, "max_length": 9, "truncation_mode": mode}
        run = train(rows, per_device_train_batch_size=4, **settings)
        assert run.losses[0] == pytest.approx(float(grouped_loss(tiny_llama(), cut, weights).detach()), rel=1e-5)


# --- what else a trainer does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_evaluation_reads_the_constraint_too(reference: str, train: Any, make_rows: Any) -> None:
    rows, others = make_rows(4), make_rows(3, seed=1)
    settings = {"reference": reference, "learning_rate": 0.5, "max_steps": 4, "eval_strategy": "steps"}
    run = train(rows, eval_dataset=others, eval_steps=2, per_device_eval_batch_size=3, **settings)
    model = run.trainer.model.eval()
    start = train(rows, max_steps=1, learning_rate=0.0).trainer.model.eval()
    expected = float(by_hand.eq3_loss(model, start, others).detach())
    assert run.logged("eval_constraint/objective")[-1] == pytest.approx(expected, rel=1e-3)
    assert len(run.logged("eval_loss")) == 2
    assert all(0 < loss < 20 for loss in run.logged("eval_loss"))
    assert run.logged("eval_constraint/weight_early")[-1] != pytest.approx(1.0, abs=1e-4)


def test_several_evaluation_sets_are_read_by_name(train: Any, make_rows: Any) -> None:
    sets = {name: Dataset.from_list(make_rows(2, seed=seed)) for seed, name in enumerate(("near", "far"))}
    run = train(make_rows(4), eval_dataset=sets, eval_strategy="steps", eval_steps=3, reference="precomputed")
    assert len(run.logged("eval_near_loss")) == len(run.logged("eval_far_loss")) == 1
    assert set(run.trainer.row_counts) == {"train", "near", "far"}


def test_callbacks_are_called_with_what_is_logged(train: Any, make_rows: Any) -> None:
    seen: list[str] = []

    class Watching(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(f"step {state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.extend(name for name in logs if name == "constraint/objective")

    train(make_rows(4), callbacks=[Watching()], max_steps=2)
    assert seen == ["step 1", "constraint/objective", "step 2", "constraint/objective"]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_a_resumed_run_is_the_whole_run(reference: str, adapter: bool, train: Any, make_rows: Any, lora: Any) -> None:
    """Its reference is still where the first began, not the checkpoint."""
    rows = make_rows(8)
    settings = {"reference": reference, "learning_rate": 0.05, "optim": "adamw_torch", "save_strategy": "steps"}
    settings |= {"save_steps": 3, "max_steps": 6, **({"peft_config": lora()} if adapter else {})}
    whole = train(rows, **settings)
    checkpoint = f"{whole.trainer.args.output_dir}/checkpoint-3"
    resumed = train(rows, resume=checkpoint, **settings)
    for name in ("loss", "constraint/objective", "constraint/weight_early"):
        assert resumed.logged(name) == pytest.approx(whole.logged(name), rel=1e-5), name
    assert len(resumed.losses) == 6
    assert resumed.distance(whole) < 1e-6
    assert whole.logged("constraint/weight_early")[5] < 0.99


def test_figures_for_each_row_come_with_evaluation(train: Any, make_rows: Any, make_trainer: Any) -> None:
    """`compute_metrics` gets the logits, from a pass without the objective."""
    shapes = []
    metrics = {"compute_metrics": lambda found: shapes.append(found.predictions.shape) or {"rows": 1.0}}
    trainer = make_trainer(make_rows(4), eval_dataset=make_rows(2, prompt=(3, 3), answer=(4, 4)), **metrics)
    assert trainer.evaluate()["eval_rows"] == 1.0
    assert shapes[0][:2] == (2, 7)
