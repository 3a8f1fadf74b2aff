"""The reference is the model as it was when the trainer was made, or another that is named; read now or beforehand."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepalign.errors import UserError
from deepalign.training.reference import Reference, kept_or_computed
from deepalign.training.start import StartingPoint

KINDS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "random": {"init_lora_weights": False},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
}
SWITCHED_OFF = ("lora", "gaussian")


def all_log_probs(model: Any, rows: list[by_hand.Row]) -> list[Tensor]:
    with torch.no_grad():
        return [by_hand.log_probs(model.eval(), row) for row in rows]


def largest_gap(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def read(reference: Reference, trainer: Any, rows: list[by_hand.Row]) -> list[Tensor]:
    """What a reference gives for each row's ids; all of them are labels here."""
    found = reference.log_probs(trainer.model, trainer.data_collator(rows))
    return [logps[: len(row["input_ids"]) - 1] for logps, row in zip(found, rows, strict=True)]


def whole(rows: list[by_hand.Row]) -> list[by_hand.Row]:
    return [{"input_ids": row["input_ids"], "labels": list(row["input_ids"])} for row in rows]


@pytest.mark.parametrize("head", ["one-pass", "trl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_had_back_after_training(
    kind: str, head: str, make_trainer: Any, make_rows: Any, lora: Any, tiny_llama: Any
) -> None:
    """Adapters that begin as nothing are switched off; any others, whose start is not the base, are put back."""
    rows = whole(make_rows(4))
    peft = KINDS[kind]
    model = tiny_llama(attention_bias=True) if kind == "biases" else tiny_llama()
    others = {} if peft is None else {"peft_config": lora(**peft)}
    trainer = make_trainer(rows, model=model, head=head, reference="online", learning_rate=0.3, **others)
    reference = Reference(trainer)
    assert reference.start.can_be_restored is (kind in SWITCHED_OFF)
    reference.start.hold()
    before = all_log_probs(trainer.model, rows)
    trainer.train()
    tuned = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert largest_gap(all_log_probs(trainer.model, rows), before) > 1e-2
    assert largest_gap(read(reference, trainer, rows), before) < 2e-5
    assert all(torch.equal(value, tuned[name]) for name, value in trainer.model.state_dict().items())
    (_, first, *_), ratios = (
        [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in ("constraint/weight_early", "constraint/log_ratio")
    )
    assert ratios[0] == pytest.approx(0.0, abs=1e-5)
    assert first != pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_a_given_adapters_own_start_is_the_reference(
    reference: str, begun: bool, train: Any, make_rows: Any, lora: Any, tiny_llama: Any
) -> None:
    """Not the bare base: the adapter is part of the model that was given, if it began as nothing or not."""
    rows = make_rows(4)
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=begun))
    for name, weight in model.named_parameters():
        if begun and ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    start = copy.deepcopy(model)
    settings = {"reference": reference, "per_device_train_batch_size": 4, "learning_rate": 0.3}
    run = train(rows, model=model, **settings)
    assert run.logged("constraint/log_ratio")[0] == pytest.approx(0.0, abs=1e-6)
    two = train(rows, model=copy.deepcopy(start), max_steps=2, **settings)
    expected = float(by_hand.eq3_loss(two.trainer.model.eval(), start, rows).detach())
    assert run.logged("constraint/objective")[2] == pytest.approx(expected, rel=1e-4)
    with start.disable_adapter():
        bare = float(by_hand.eq3_loss(two.trainer.model, start, rows).detach())
    assert bare != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("reference", ["online", "precomputed"])
@pytest.mark.parametrize("adapter", [False, True])
def test_another_model_can_be_the_reference(
    adapter: bool, reference: str, train: Any, make_rows: Any, lora: Any, tiny_llama: Any
) -> None:
    rows, other = make_rows(4), tiny_llama(7)
    peft = {"peft_config": lora()} if adapter else {}
    run = train(rows, reference_model=other, reference=reference, per_device_train_batch_size=4, **peft)
    expected = float(by_hand.eq3_loss(tiny_llama(), tiny_llama(7), rows).detach())
    assert run.logged("constraint/objective")[0] == pytest.approx(expected, rel=1e-5)
    assert abs(run.logged("constraint/log_ratio")[0]) > 0.1


def test_the_other_model_is_not_changed(train: Any, make_rows: Any, tiny_llama: Any) -> None:
    """Neither its weights nor the mode of any part, and dropout is off while it is read."""
    other = tiny_llama(7, attention_dropout=0.5).train()
    other.model.layers[1].eval()
    modes = [part.training for part in other.modules()]
    rows = make_rows(4)
    runs = [train(rows, reference_model=other, reference="online") for _ in range(2)]
    assert [part.training for part in other.modules()] == modes
    assert all(torch.equal(one, new) for one, new in zip(other.parameters(), tiny_llama(7).parameters(), strict=True))
    still = train(rows, reference_model=tiny_llama(7), reference="online")
    for run in runs:
        assert run.logged("constraint/objective") == pytest.approx(still.logged("constraint/objective"), rel=1e-6)


def test_a_reference_over_other_tokens_is_refused(make_trainer: Any, make_rows: Any, random_model: Any) -> None:
    with pytest.raises(
        UserError, match=r"the reference model has 97 output tokens and the tuned one \d+; give"
    ) as told:
        make_trainer(make_rows(2), reference_model=random_model("llama"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("adapter", [False, True])
def test_dropout_is_off_while_the_reference_is_read(
    adapter: bool, make_trainer: Any, make_rows: Any, lora: Any, tiny_llama: Any
) -> None:
    """So the reference of a row is one number, though the tuned model's is not."""
    rows = whole(make_rows(3))
    peft = {"peft_config": lora(lora_dropout=0.5, init_lora_weights=False)} if adapter else {}
    model = tiny_llama(attention_dropout=0.0 if adapter else 0.5)
    trainer = make_trainer(rows, model=model, reference="precomputed", shuffle_dataset=False, **peft)
    expected = all_log_probs(trainer.model, rows)
    trainer.model.train()
    noisy = trainer.plain_log_probs(trainer.model, trainer.data_collator(rows))
    assert largest_gap([logps[: len(one)] for logps, one in zip(noisy, expected, strict=True)], expected) > 1e-2
    reference = Reference(trainer)
    reference.start.hold()
    assert largest_gap(read(reference, trainer, rows), expected) < 2e-5
    assert trainer.model.training
    for column, logps in zip(trainer.train_dataset["reference_log_probs"][:], expected, strict=True):
        assert column == pytest.approx([0.0, *logps.tolist()], abs=2e-5)


def test_weights_are_put_back_exactly_even_after_an_error(tiny_llama: Any, moved: Any) -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    start = StartingPoint(model)
    start.hold()
    moved(model)
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    places = [weight.data_ptr() for weight in model.parameters()]
    with contextlib.suppress(KeyError), start.restored(model):
        assert not any(part.training for part in model.modules())
        pairs = zip(model.parameters(), tiny_llama().parameters(), strict=True)
        assert all(torch.equal(now, before) for now, before in pairs)
        raise KeyError
    assert all(torch.equal(value, tuned[name]) for name, value in model.state_dict().items())
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert [part.training for part in model.modules()].count(False) == 1


def test_frozen_weights_are_not_held_twice(tiny_llama: Any, moved: Any) -> None:
    model = tiny_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    start = StartingPoint(model)
    before = model.lm_head.weight.detach().clone()
    assert not start.can_be_restored
    start.hold()
    moved(model.lm_head)
    start.hold()
    with start.restored(model):
        assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


# --- read beforehand ------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that the reference is read on all rows."""
    seen: list[str] = []
    real = Reference._read_rows

    def counting(self: Reference, dataset: Any, name: str) -> Any:
        seen.append(name)
        return real(self, dataset, name)

    monkeypatch.setattr(Reference, "_read_rows", counting)
    return seen


def test_what_was_read_is_kept_by_content(
    passes: list[str], make_trainer: Any, make_rows: Any, tiny_llama: Any, moved: Any, tmp_path: Path
) -> None:
    """The same weights and rows are read once; others anew."""
    rows = make_rows(4)
    cache = {"reference": "precomputed", "reference_cache": str(tmp_path / "kept")}
    first, second = make_trainer(rows, **cache), make_trainer(rows, seed=3, learning_rate=1.0, **cache)
    assert passes == ["train"]
    kept = [sorted(trainer.train_dataset["reference_log_probs"][:]) for trainer in (first, second)]
    assert kept[0] == kept[1]
    other_labels = [{**rows[0], "labels": [-100, *rows[0]["input_ids"][1:]]}, *rows[1:]]
    make_trainer(other_labels, **cache)
    make_trainer(make_rows(4, seed=1), **cache)
    make_trainer(rows, model=tiny_llama(1), **cache)
    make_trainer(rows, model=moved(tiny_llama(), by=1e-4), **cache)
    make_trainer(rows, reference_model=tiny_llama(2), **cache)
    make_trainer(rows, eval_dataset=make_rows(2, seed=2), **cache)
    assert passes == ["train"] * 6 + ["eval"]
    assert len(list((tmp_path / "kept").iterdir())) == 7


def test_a_fresh_adapter_does_not_make_another_reference(
    passes: list[str], make_trainer: Any, make_rows: Any, lora: Any, tmp_path: Path
) -> None:
    cache = {"reference": "precomputed", "reference_cache": str(tmp_path / "kept")}
    for seed, rank in ((0, 4), (1, 4), (1, 8)):
        make_trainer(make_rows(4), peft_config=lora(r=rank), seed=seed, shuffle_dataset=False, **cache)
    assert passes == ["train"]


@pytest.mark.parametrize("harm", ["cut", "empty", "short", "other name"])
def test_a_broken_file_is_made_anew(
    harm: str, passes: list[str], make_trainer: Any, make_rows: Any, tmp_path: Path
) -> None:
    rows = make_rows(4)
    cache = {"reference": "precomputed", "reference_cache": str(tmp_path)}
    expected = make_trainer(rows, **cache).train_dataset["reference_log_probs"][:]
    (file,) = tmp_path.glob("*.safetensors")
    values = load_file(file)["log_probs"].clone()
    if harm in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[: 0 if harm == "empty" else 40])
    else:
        save_file(
            {"log_probs" if harm == "short" else "other": values[: -1 if harm == "short" else None].clone()}, file
        )
    found = make_trainer(rows, **cache).train_dataset["reference_log_probs"][:]
    assert passes == ["train", "train"]
    assert found == expected
    assert torch.equal(load_file(file)["log_probs"], values)


def test_a_reference_that_is_no_number_is_told_by_row(tmp_path: Path) -> None:
    for value in (float("nan"), float("-inf")):
        with pytest.raises(UserError, match="no finite log-probability in row 1"):
            kept_or_computed(tmp_path / "kept", [1, 2], lambda value=value: [[0.0], [0.0, value]], writes=True)  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_by_other_processes(tmp_path: Path) -> None:
    rows = [[0.0, -1.0], [0.0]]
    assert kept_or_computed(tmp_path / "kept", [2, 1], lambda: rows, writes=False) == rows
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "early"), [(1, False), (3, True)])
def test_by_default_it_is_read_beforehand_where_all_rows_are_seen(
    steps: int, early: bool, passes: list[str], make_trainer: Any, make_rows: Any
) -> None:
    make_trainer(make_rows(6), max_steps=steps)
    assert bool(passes) is early


def test_a_column_of_the_rows_is_taken_as_it_is(passes: list[str], train: Any, make_rows: Any, tiny_llama: Any) -> None:
    rows = make_rows(4)
    shifted = [
        {**row, "reference_log_probs": [0.0, *(logps - 0.5).tolist()]}
        for row, logps in zip(rows, all_log_probs(tiny_llama(), rows), strict=True)
    ]
    run = train(shifted, per_device_train_batch_size=4, eval_dataset=make_rows(2), learning_rate=0.2)
    assert run.logged("constraint/log_ratio")[0] == pytest.approx(0.5, abs=1e-5)
    weight = by_hand.weight(0.5, 0.0, by_hand.beta(0))
    assert run.logged("constraint/weight_first")[0] == pytest.approx(weight, rel=1e-5)
    assert not passes
    # Rows without the column are held to the model's own start.
    assert run.trainer.evaluate()["eval_constraint/log_ratio"] != pytest.approx(0.0, abs=1e-3)


def test_packing_would_lose_that_column(make_trainer: Any, make_rows: Any) -> None:
    rows = [{**row, "reference_log_probs": [-1.0] * len(row["labels"])} for row in make_rows(4)]
    with pytest.raises(UserError, match="packing keeps no column reference_log_probs"):
        make_trainer(rows, packing=True, max_length=64)


def test_rows_that_come_after_training_need_a_start_that_was_kept(train: Any, make_rows: Any, lora: Any) -> None:
    """Otherwise the tuned model would be held to itself."""
    rows, others = make_rows(4), Dataset.from_list(make_rows(3, seed=1))
    settings = {"learning_rate": 0.5, "per_device_eval_batch_size": 3}
    online = train(rows, reference="online", **settings).trainer.evaluate(others)
    run = train(rows, reference="precomputed", **settings)
    with pytest.raises(UserError, match="pass them as eval_dataset"):
        run.trainer.evaluate(others)
    early = train(rows, reference="precomputed", eval_dataset=others, **settings).trainer.evaluate()
    assert early["eval_constraint/log_ratio"] == pytest.approx(online["eval_constraint/log_ratio"], rel=1e-4)
    assert abs(early["eval_constraint/log_ratio"]) > 1e-3
    adapted = train(rows, reference="precomputed", peft_config=lora(), **settings).trainer.evaluate(others)
    assert abs(adapted["eval_constraint/log_ratio"]) > 1e-4


def test_a_checkpoint_of_another_start_is_refused(make_trainer: Any, make_rows: Any, tiny_llama: Any) -> None:
    """As when the checkpoint itself, or a later model, is given as the model to go on with."""
    rows, saving = make_rows(4), {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(rows, **saving).train()
    same = make_trainer(rows, **{**saving, "max_steps": 2})
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 2
    other = make_trainer(rows, model=tiny_llama(seed=5), **saving)
    with pytest.raises(UserError, match=r"checkpoint-\d was trained against reference [0-9a-f]{16}, and this model"):
        other.train(resume_from_checkpoint=True)
