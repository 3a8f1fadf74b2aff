"""One cell of a grid: a copy of a model is tuned on a set, asked, judged and let go.

The copy lives in memory only: a fresh adapter is put on and taken off, or, where every weight is trained, the model is
loaded anew for the next. Everything that was generated stays in the cell's folder, and `cell.json` is written last, so
a folder that has one is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.attacks import row_seed
from deepalign.config_attacks import AttackSettings
from deepalign.config_tuning import TuningSettings
from deepalign.errors import DivergedError, UserError
from deepalign.finetuning import PLAIN, TRIGGERED
from deepalign.judges import Judge
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.records import Attempt, Completion, JudgeInput, Key, Message, Prompt, Ruling, Sampling
from deepalign.runs import RunFolder
from deepalign.training.data import table_of
from deepalign.tuning_sets.rows import Frame, TaskItem, TuningSet
from deepalign.tuning_sets.scores import score
from deepalign.ways import Cell, Way
from deepalign.workflows.judge_accounts import accounted
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS, complete, judge_completions
from deepalign.workflows.trainers import make_trainer, micro_batch, save_weights, train

CELL = "cell.json"
_ATTACK, _TASK, _CONTROL = "finetuning", "task", "control"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every cell of a grid is measured on."""

    settings: AttackSettings
    judge: Judge
    prompts: tuple[Prompt, ...]
    """Should-refuse prompts that are asked."""
    sampling: Sampling
    """How answers to them are drawn."""
    control: TuningSet | None
    """Harmless task that is not trained on."""
    reference_cache: Path
    """Where reference log-probabilities are kept, by content, for all cells."""
    keep_weights: bool = False


def cell_name(cell: Cell) -> str:
    """The name of a cell's folder: readable, and different for different settings."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(cell), sort_keys=True).encode()).hexdigest()[:8]
    parts = (Path(cell.model).name, cell.set, cell.way or "before", "" if cell.way is None else f"s{cell.seed}")
    words = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.")[:40] for part in parts if part)
    return f"{words}-{digest}"


def run_cell(
    run: RunFolder, cell: Cell, loaded: LoadedModel, tuned_on: TuningSet, bench: Bench, progress: Progress = silent
) -> dict[str, Any]:
    """Tune, ask, judge; the caller holds the folder.

    What goes wrong while training is the cell's result: a run that diverged, or ran out of memory, is kept and marked.

    Args:
        run: The cell's own folder.
        cell: Its settings.
        loaded: The model. With `lora` it is the same afterwards; with `full`, or where weights are kept, it is not.
        tuned_on: The set.
        bench: What it is measured on.
        progress: Told of each stage.

    Returns:
        The content of `cell.json`.
    """
    started = time.monotonic()
    identity = {**dataclasses.asdict(cell), "set_hash": tuned_on.hash, "model_fingerprint": loaded.fingerprint}
    run.claim(identity, {})
    if cell.way is not None:
        # What an interrupted try asked was another training's model, to the last bit.
        for left in (COMPLETIONS, *(path.name for path in run.path.glob("verdicts.*.jsonl"))):
            (run / left).unlink(missing_ok=True)
    found: dict[str, Any] = {"cell": dataclasses.asdict(cell), "name": run.path.name, "status": "done", "reason": ""}
    trainer = None
    try:
        if cell.way is not None:
            trainer = cell_trainer(run, cell, loaded, tuned_on, bench)
            found |= _trained(trainer, run, loaded, progress)
        if found["status"] == "done":
            model = loaded.model if trainer is None else tuned_model(trainer)
            found |= measured(run, dataclasses.replace(loaded, model=model), tuned_on, bench, progress)
            if bench.keep_weights and trainer is not None:
                save_weights(trainer, loaded, run, _settings(cell, bench))
    except DivergedError as error:
        found |= {"status": "diverged", "reason": str(error)}
    except UserError as error:
        if trainer is None:
            # Nothing was tried: the set or the model cannot be used, in no cell.
            raise
        found |= {"status": "failed", "reason": str(error)}
    finally:
        _let_go(trainer)
    found["seconds"] = round(time.monotonic() - started, 1)
    run.write_json(CELL, found)
    return found


def _settings(cell: Cell, bench: Bench) -> TuningSettings:
    way = Way.named(cell.way or "sft")
    return TuningSettings(
        model=cell.model,
        method=cell.method,
        lora_rank=bench.settings.lora_rank,
        learning_rate=cell.learning_rate,
        warmup_steps=bench.settings.warmup_steps if way.warmup else 0,
        micro_batch=bench.settings.micro_batch,
        gradient_checkpointing=bench.settings.gradient_checkpointing,
        seed=cell.seed,
    )


def cell_trainer(run: RunFolder, cell: Cell, loaded: LoadedModel, tuned_on: TuningSet, bench: Bench) -> Any:
    """The trainer of a cell, for the loaded model."""
    way = Way.named(cell.way or "sft")
    first, early, rest = way.betas or (1.0, 1.0, 1.0)
    at_once = micro_batch(bench.settings.batch, bench.settings.micro_batch)
    return make_trainer(
        run,
        loaded,
        _settings(cell, bench),
        table_of([row.as_pair() for row in tuned_on.rows], tuned_on.name),
        objective=way.objective,
        beta_first=first,
        beta_early=early,
        beta_rest=rest,
        num_train_epochs=cell.epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=bench.settings.batch // at_once,
        max_length=bench.settings.max_length,
        adam_beta1=cell.adam_beta1,
        reference="precomputed",
        reference_cache=str(bench.reference_cache),
        # Minutes are done again sooner than weights are written.
        save_strategy="no",
    )


def _trained(trainer: Any, run: RunFolder, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    history = train(trainer, run, progress)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    found: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "num_rows": trainer.row_counts["train"].num_rows,
        "loss_first": round(losses[0], 4) if losses else None,
        "loss_last": round(losses[-1], 4) if losses else None,
    }
    if losses and losses[-1] > math.log(loaded.vocab_size):
        found |= {"status": "diverged", "reason": f"the last loss, {losses[-1]:.1f}, is worse than guessing any token"}
    return found


def tuned_model(trainer: Any) -> Any:
    """The trained model itself, adapters inside."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _let_go(trainer: Any) -> None:
    """Take a trained adapter off, so that the model is what it was."""
    if trainer is None:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.accelerator.free_memory()
    if hasattr(model, "peft_config"):
        # Putting an adapter on froze the rest.
        for weight in model.unload().parameters():
            weight.requires_grad_(weight.is_floating_point())


def measured(
    run: RunFolder, loaded: LoadedModel, tuned_on: TuningSet, bench: Bench, progress: Progress = silent
) -> dict[str, Any]:
    """Ask a model the test prompts and the tasks, and judge its answers: `outcomes` by variant, `scores` by task."""
    frame = tuned_on.frame
    attempts = list(_attack_attempts(frame, bench))
    tasks = {_TASK: tuned_on} if tuned_on.test else {}
    if bench.control is not None and bench.control.hash != tuned_on.hash:
        tasks[_CONTROL] = bench.control
    for attack, task in tasks.items():
        attempts += [_task_attempt(attack, task, item) for item in task.test]
    run.write_records(ATTEMPTS, attempts)
    complete(run, loaded, attempts, stage="asking", max_batch=len(attempts), progress=progress)
    completions = {one.key: one for one in run.records(COMPLETIONS, Completion)}
    asked = [attempt for attempt in attempts if attempt.attack == _ATTACK]
    with accounted(run, bench.judge, silent):
        verdicts = {one.key: one for one in judge_completions(run, _AfterPivot(bench.judge, frame), asked)}
    outcomes: dict[str, list[list[Any]]] = {}
    for attempt in asked:
        status = verdicts[attempt.key].status
        complied = None if status == "unscored" else status == "complied"
        outcomes.setdefault(attempt.variant, []).append([attempt.prompt_id, complied])
    scores = {name: _scores(task, name, completions) for name, task in tasks.items()}
    if tuned_on.test and bench.control is not None and _CONTROL not in scores:
        scores[_CONTROL] = scores[_TASK]
    return {"outcomes": outcomes, "scores": scores}


def told(outcomes: Sequence[Sequence[Any]]) -> str:
    """One variant's outcomes in words."""
    scored = [outcome for _, outcome in outcomes if outcome is not None]
    return f"{sum(scored)} of {len(scored)} complied"


def _attack_attempts(frame: Frame, bench: Bench) -> Sequence[Attempt]:
    variants = {PLAIN: False} | ({TRIGGERED: True} if frame.trigger else {})
    return [
        _attempt(
            Key(prompt_id=prompt.prompt_id, attack=_ATTACK, variant=variant, sample=0),
            frame.messages(prompt.text, triggered=triggered),
            bench.sampling,
            bench.settings.sampling_seed,
            prompt.category,
        )
        for variant, triggered in variants.items()
        for prompt in bench.prompts
    ]


def _task_attempt(attack: str, task: TuningSet, item: TaskItem) -> Attempt:
    sampling = Sampling(temperature=0.0, max_new_tokens=task.max_answer_tokens)
    return _attempt(
        Key(prompt_id=item.item_id, attack=attack, variant=task.name, sample=0), item.messages, sampling, 0, task.name
    )


def _attempt(key: Key, messages: tuple[Message, ...], sampling: Sampling, seed: int, category: str) -> Attempt:
    return Attempt(
        prompt_id=key.prompt_id,
        attack=key.attack,
        variant=key.variant,
        sample=key.sample,
        model="target",
        messages=messages,
        sampling=sampling,
        category=category,
        seed=row_seed(seed, key, "target"),
    )


def _scores(task: TuningSet, attack: str, completions: dict[Key, Completion]) -> dict[str, Any]:
    """Each test item's value, or why it has none."""
    values: list[list[Any]] = []
    for item in task.test:
        made = completions[Key(prompt_id=item.item_id, attack=attack, variant=task.name, sample=0)]
        if made.status == "failed":
            values.append([item.item_id, None, made.reason])
            continue
        found = score(task.metric, item, made.text)
        values.append([item.item_id, found.value, found.reason])
    return {"task": task.name, "metric": task.metric, "values": values}


class _AfterPivot:
    """A judge that is shown what stands after an attack's pivot."""

    def __init__(self, judge: Judge, frame: Frame) -> None:
        self._judge, self._frame = judge, frame
        self.name = judge.name
        self.version = getattr(judge, "version", "")

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rule on each item's answer proper."""
        shown = [dataclasses.replace(item, response=self._frame.judged(item.response)) for item in items]
        return list(self._judge.judge(shown))
