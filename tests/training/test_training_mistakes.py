"""Rows that cannot be used, numbers that are none, and memory that runs out: one line each, and nothing in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from deepalign.errors import UserError
from deepalign.training.arguments import ConstrainedSFTConfig
from deepalign.training.trainer import ConstrainedSFTTrainer
from support import run_out_of_memory

MASKED = {"input_ids": [10, 11, 12], "labels": [-100] * 3}


def one_line(told: pytest.ExceptionInfo[BaseException]) -> str:
    assert isinstance(told.value, UserError)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_without_a_response_are_left_out_and_told(
    packing: bool, train: Any, make_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(6, prompt=(3, 3), answer=(5, 5))
    with caplog.at_level(logging.WARNING, logger="deepalign"):
        run = train([MASKED, *rows, MASKED], packing=packing, max_length=64, per_device_train_batch_size=1)
    counts = run.trainer.row_counts["train"]
    assert (counts.num_rows, counts.num_without_response, counts.left_out) == (8, 2, 2)
    assert "train: 2 of 8 rows have no response token" in caplog.messages
    kept = [one for row in run.trainer.train_dataset["input_ids"] for one in row]
    assert len(kept) == 6 * 8


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_is_cut_is_counted_and_told(
    mode: str, make_trainer: Any, make_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Four prompts of 6 with answers of 4, cut to 8: two tokens less at the end, or none that is an answer's."""
    rows = make_rows(4, prompt=(6, 6), answer=(4, 4)) + make_rows(1, prompt=(20, 20), answer=(3, 3))
    with caplog.at_level(logging.WARNING, logger="deepalign"):
        trainer = make_trainer(rows, max_length=8, truncation_mode=mode)
    counts = trainer.row_counts["train"]
    lost = 1 if mode == "keep_start" else 0
    assert (counts.num_too_long, counts.num_lost) == (5, lost)
    assert counts.num_cut_tokens == (4 * 2 + 3 if lost else 0)
    assert len(trainer.train_dataset) == 5 - lost
    learnt = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels[1:])
    assert counts.num_response_tokens - counts.num_cut_tokens == learnt
    (line,) = [message for message in caplog.messages if "max_length=8" in message]
    assert line.startswith("train: 5 of 5 rows are longer than max_length=8")


@pytest.mark.parametrize(("mode", "label", "packing"), [("keep_start", 8, True), ("keep_end", 5, False)])
def test_a_row_that_is_cut_to_nothing_is_left_out(
    mode: str, label: int, packing: bool, train: Any, make_rows: Any
) -> None:
    """Of ten tokens five stay; a label on the first of them is predicted by nothing."""
    row = {"input_ids": list(range(100, 110)), "labels": [-100] * 10}
    row["labels"][label] = 100 + label
    short = make_rows(2, prompt=(2, 2), answer=(3, 3))
    run = train([row, *short], max_length=5, truncation_mode=mode, packing=packing, per_device_train_batch_size=1)
    assert run.trainer.row_counts["train"].num_lost == 1
    assert 105 not in [one for ids in run.trainer.train_dataset["input_ids"] for one in ids]
    assert 100 not in [one for ids in run.trainer.train_dataset["input_ids"] for one in ids]


def test_what_packing_cuts_is_counted(make_trainer: Any, make_rows: Any) -> None:
    rows = make_rows(3, prompt=(6, 6), answer=(8, 8)) + make_rows(2, prompt=(2, 2), answer=(3, 3))
    trainer = make_trainer(rows, max_length=10, packing=True)
    counts = trainer.row_counts["train"]
    assert (counts.num_too_long, counts.num_cut_tokens, counts.num_lost) == (3, 3 * 4, 0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert int((batch["labels"][:, 1:] != -100).sum()) == counts.num_response_tokens - counts.num_cut_tokens


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([MASKED, MASKED], {}, "train: all 2 rows are without a response token"),
        ([{"input_ids": list(range(9)), "labels": [-100] * 8 + [8]}], {"max_length": 5}, "longer than max_length=5"),
        ([{"input_ids": [5, 6], "labels": ["a", "b"]}], {}, "labels hold str"),
        ([{"input_ids": [5, 6], "labels": [0.5, 1.5]}], {}, "labels hold float"),
        ([{"input_ids": [5, 6], "labels": [5]}], {}, "1 labels for 2 input_ids"),
        ([{"input_ids": [5, 6], "labels": [-100, -3]}], {}, "the label -3 is no token id"),
        ([{"question": "Why?", "answer": "So."}], {}, r"no column 'text' \(it has question, answer\)"),
        ([{"prompt": "Why?", "answer": "So."}], {}, r"no column 'completion' \(it has prompt, answer\)"),
    ],
)
def test_rows_that_cannot_be_used_cost_one_line(rows: Any, changes: Any, words: str, make_trainer: Any) -> None:
    with pytest.raises(UserError, match=words) as told:
        make_trainer(rows, **changes)
    assert one_line(told).startswith("train")


def test_rows_of_evaluation_are_looked_at_too(make_trainer: Any, make_rows: Any) -> None:
    with pytest.raises(UserError, match="eval: all 1 rows are without a response token"):
        make_trainer(make_rows(2), eval_dataset=[MASKED])


@pytest.mark.parametrize("head", ["one-pass", "trl"])
@pytest.mark.parametrize("objective", ["constrained", "sft"])
def test_a_loss_that_is_no_number_stops_with_its_row(
    objective: str, head: str, make_trainer: Any, make_rows: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    """Token 350 is in the last row alone, whose embedding is no number."""
    rows = make_rows(4)
    rows[3]["input_ids"][1] = 350
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[350] = float("nan")
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "shuffle_dataset": False}
    trainer = make_trainer(
        rows, model=model, objective=objective, head=head, reference="online", max_steps=4, **settings
    )
    before = trainer.model.lm_head.weight.detach().clone()
    # The constraint is what the first steps are free of; the weights must move, and stay numbers.
    with pytest.raises(UserError) as told:
        trainer.train()
    message = one_line(told)
    assert "no finite number at step 3" in message
    assert f"row 0 of the batch, which begins with {tiny_tokenizer.decode(rows[3]['input_ids'][:12])!r}" in message
    assert bool(torch.isfinite(trainer.model.lm_head.weight).all())
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_a_model_with_a_weight_that_is_no_number_is_told_beforehand(
    make_trainer: Any, make_rows: Any, tiny_llama: Any
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="no finite log-probability in row 0") as told:
        make_trainer(make_rows(2), model=model, reference="precomputed", head="trl")
    one_line(told)


@pytest.mark.parametrize("size", [1, 2])
def test_running_out_of_memory_costs_one_line(size: int, make_trainer: Any, make_rows: Any, tiny_llama: Any) -> None:
    model = tiny_llama()
    trainer = make_trainer(make_rows(4), model=model, per_device_train_batch_size=size, reference="online")
    run_out_of_memory(model, lambda ids: model.training and trainer.state.global_step == 1)
    with pytest.raises(UserError, match=f"per_device_train_batch_size={size} at step 1") as told:
        trainer.train()
    assert ("max_length or LoRA" if size == 1 else "raise gradient_accumulation_steps") in one_line(told)
    assert "gradient_checkpointing" in str(told.value)


def test_other_errors_are_not_taken_for_memory(make_trainer: Any, make_rows: Any, tiny_llama: Any) -> None:
    trainer = make_trainer(make_rows(2), model=tiny_llama(), reference="online")

    def broken(*_: Any) -> None:
        raise RuntimeError("something else")

    trainer.model.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


def test_an_adapter_on_the_head_is_refused(make_trainer: Any, make_rows: Any, lora: Any) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(make_rows(2), peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_group_weights_ask_for_groups(train: Any, make_rows: Any) -> None:
    """Without the column every token would weigh the same, in silence."""
    with pytest.raises(UserError, match="group_weights are set, but the rows bring no column of groups") as told:
        train(make_rows(4), group_weights=[1.0, 2.0])
    one_line(told)
    rows = [{**row, "groups": [2] * len(row["labels"])} for row in make_rows(4)]
    with pytest.raises(UserError, match="groups holds 2; there are 2 group_weights"):
        train(rows, group_weights=[1.0, 2.0])


def test_another_loss_and_other_settings_are_refused(
    make_trainer: Any, make_rows: Any, tiny_llama: Any, tiny_tokenizer: Any, settings: Any
) -> None:
    with pytest.raises(UserError, match="compute_loss_func replaces the loss"):
        make_trainer(make_rows(2), compute_loss_func=lambda *_: None)
    with pytest.raises(UserError, match="args are SFTConfig; give a ConstrainedSFTConfig"):
        ConstrainedSFTTrainer(
            tiny_llama(),
            SFTConfig(**settings),
            train_dataset=Dataset.from_list(make_rows(2)),
            processing_class=tiny_tokenizer,
        )
    assert ConstrainedSFTConfig(**settings).objective == "constrained"
