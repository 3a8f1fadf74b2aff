"""Training steps of several trainers in one process, on the same batches, one step at a time.

A step is what `Trainer.train()` does between two calls of `on_step_begin`: the next batch, `training_step` (the loss,
what is logged of it, and the gradient), clipping, the optimizer, the schedule. It is written out here, of the trainer's
own methods, because `train()` cannot be left after a step and taken up again; callbacks and logging, which come after
the step, are left out on all sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.compare import Comparison
from deepalign.prompts import builtin_prompts

_IGNORED = -100
_TOLERANCE = {False: 1e-4, True: 1e-2}
"""Of the first step's losses, relative; in bfloat16 the sides round at other places."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is made of."""

    rows: int
    tokens: int
    """Of each row."""
    response: int
    """The last tokens of each row, which carry loss."""
    bf16: bool = False
    """Autocast over float32 weights, as TRL does by default on a GPU."""

    @classmethod
    def on(cls, device: torch.device) -> Work:
        """As much as keeps the device busy."""
        if device.type == "cuda":
            return cls(rows=32, tokens=1024, response=512, bf16=True)
        return cls(rows=8, tokens=256, response=128)

    def data(self, tokenizer: Any, steps: int) -> Dataset:
        """Rows for a number of steps: the built-in answers, laid end to end and cut to length."""
        text = [answer.answer or "" for answer in builtin_prompts("should-refuse")]
        stream = cycle([token for ids in tokenizer(text, add_special_tokens=False)["input_ids"] for token in ids])
        ids = [list(islice(stream, self.tokens)) for _ in range(steps * self.rows)]
        prompt = self.tokens - self.response
        return Dataset.from_dict({"input_ids": ids, "labels": [[_IGNORED] * prompt + row[prompt:] for row in ids]})

    def arguments(self, device: torch.device, steps: int, folder: Path) -> dict[str, Any]:
        """Settings of a trainer that are the same on all sides."""
        return {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": self.rows,
            "per_device_eval_batch_size": self.rows,
            "learning_rate": 2e-5,
            "adam_beta1": 0.5,
            "warmup_steps": 0,
            "bf16": self.bf16,
            "use_cpu": device.type == "cpu",
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
        }

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What is written beside the figures."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "response_tokens": self.response,
            "dtype": "bfloat16 autocast over float32" if self.bf16 else "float32",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "gradient_checkpointing": False,
        }


class Steps:
    """A trainer's optimizer steps, one for each call.

    Args:
        trainer: Not trained yet; its data holds a batch for every call.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        loader = trainer.get_train_dataloader()
        self._model, loader = trainer._prepare_for_training(trainer.args.max_steps, loader, None)
        self._batches: Iterator[Any] = iter(loader)
        self._losses: list[torch.Tensor] = []
        trainer.current_gradient_accumulation_steps = 1

    def __call__(self) -> None:
        """One optimizer step on the next batch."""
        trainer = self.trainer
        (batch,), num_items = trainer.get_batch_samples(self._batches, 1, trainer.args.device)
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        self._losses.append(trainer.training_step(self._model, batch, num_items))
        trainer._clip_grad_norm(self._model)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self._model.zero_grad()

    @property
    def losses(self) -> list[float]:
        """Of every step so far, as the trainer reports them."""
        return [float(loss) for loss in self._losses]


def with_losses(comparison: Comparison, sides: Mapping[str, Steps], *, against: str) -> Comparison:
    """The comparison with every step's loss, after checking that all sides began with the same.

    Raises:
        RuntimeError: They did not: the sides do different work, and their times say nothing.
    """
    losses = {name: side.losses for name, side in sides.items()}
    first = losses[against][0]
    apart = {name: own[0] - first for name, own in losses.items() if name != against}
    allowed = _TOLERANCE[bool(sides[against].trainer.args.bf16)] * abs(first)
    wrong = {name: gap for name, gap in apart.items() if not abs(gap) <= allowed}
    if wrong:
        raise RuntimeError(f"{comparison.name}: the first step's losses are not {first:.6f}, but differ by {wrong}")
    return replace(
        comparison, figures={**comparison.figures, "losses": losses, "first_step_loss_over_" + against: apart}
    )
