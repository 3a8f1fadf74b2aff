"""Settings of what looks into fine-tuning: dynamics while it goes on, and margins before; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from deepalign.config_attacks import AttackSettings, GridConfig
from deepalign.config_run import Whole
from deepalign.config_tuning import Method
from deepalign.errors import UserError
from deepalign.ways import Way


@dataclass(frozen=True)
class _Model:
    model: str
    """Model: hub id, local folder, adapter folder, or a testbed name."""


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig(AttackSettings, _Model):
    """Follow one fine-tuning run position by position: loss, gradient norm, KL, and the attack success rate by step."""

    set: str = "harmful"
    """Set to tune on: a built-in or public name, or a file of your own."""

    way: str = "sft"
    """How: sft, sft-warmup, constrained, constrained-warmup, uniform-B."""

    steps: tuple[Whole, ...] = (0, 2, 4, 6, 12, 24)
    """Optimizer steps after which everything is measured (the paper: 0, 2, 4, 6)."""

    seed: Whole = 0
    """Seed of training."""

    method: Method = "lora"
    """Train a LoRA adapter, or every weight."""

    learning_rate: float | None = None
    """Peak learning rate; default 5e-4 for LoRA and 2e-5 (the paper's) for every weight."""

    epochs: float = 4.0
    """Passes over the rows."""

    adam_beta1: float = 0.5
    """Momentum of the optimizer."""

    positions: Whole = 32
    """Response positions to measure, from the first."""

    gradient_rows: Whole = 8
    """Rows whose gradient norms are measured; 0 for none."""

    gradient_positions: Whole = 16
    """Response positions whose gradient norms are measured."""

    last_blocks: Whole | None = None
    """Gradient norms of the last so many blocks and the head only; default of all weights."""

    text_column: str = "prompt"
    """Column with the user's text in a file of your own that is in no format of TRL's."""

    answer_column: str = "completion"
    """Column with the assistant's text."""

    show_completions: bool = False
    """Show completions in the report instead of redacting them."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        AttackSettings.__post_init__(self)
        if not self.steps or min(self.steps) < 0 or len(set(self.steps)) != len(self.steps):
            raise UserError(f"--steps {list(self.steps)}: give different whole numbers from 0 up")
        for name in ("positions", "gradient_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
        if self.gradient_rows < 0 or (self.last_blocks is not None and self.last_blocks < 1):
            raise UserError("--gradient-rows is a whole number from 0 up, and --last-blocks one from 1 up")
        self.grid  # noqa: B018 - raises for what the grid would refuse

    @property
    def grid(self) -> GridConfig:
        """The grid of which this run is the one cell."""
        shared = {each.name: getattr(self, each.name) for each in fields(AttackSettings)}
        return GridConfig(
            **shared,
            models=(self.model,),
            sets=(self.set,),
            ways=(self.way,),
            seeds=(self.seed,),
            methods=(self.method,),
            learning_rates=() if self.learning_rate is None else (self.learning_rate,),
            epochs=(self.epochs,),
            adam_beta1=(self.adam_beta1,),
            control="none",
            text_column=self.text_column,
            answer_column=self.answer_column,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagnoseConfig:
    """Will a constraint hold? Margins of the openings that fine-tuning would have to raise, from one pass."""

    model: str = field(kw_only=False)
    """Model to fine-tune: hub id, local folder, adapter folder, or a testbed name."""

    data: str | None = None
    """The fine-tuning data: a JSONL, JSON, CSV or parquet file, or a hub id; what the constraint would cost on it."""

    prompt_column: str | None = None
    """Column with the user's text, where the rows are in no format of TRL's; used with --completion-column."""

    completion_column: str | None = None
    """Column with the assistant's text."""

    prompts: str = "should-refuse"
    """Should-refuse prompts; their harmful answers are the openings that must not rise."""

    limit: Whole | None = 40
    """Use only this many of them, spread over the categories."""

    data_limit: Whole | None = 256
    """Use only the first so many rows of the data."""

    answers_from: str = "testbed:base"
    """Unaligned model that samples answers where prompts have none."""

    ways: tuple[str, ...] = ("constrained", "uniform-0.1", "uniform-0.5", "uniform-2")
    """Schedules of the constraint's strength to judge."""

    positions: Whole = 10
    """Response positions that count."""

    need: float = 0.5
    """Probability that a token has to come to."""

    push: float = 0.5
    """Share of plain fine-tuning's push at which a token counts as held (Eq. 5)."""

    share: float = 0.9
    """Share of the openings that a schedule has to hold."""

    grid: Path | None = None
    """Run folder of a grid with this model: predictions are compared with its outcomes."""

    output: Path | None = None
    """Run folder; default one under runs/, which is printed."""

    system_prompt: str | None = None
    """System prompt; default no system message, "" an empty one."""

    chat_template: str | None = None
    """Jinja file with a chat template, or `plain`; default the model's own."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights; auto is bfloat16 where the hardware is fast at it."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps."""

    seed: Whole = 0
    """Seed of what is sampled."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not self.ways:
            raise UserError("--ways is empty; give at least one")
        for way in self.ways:
            if Way.named(way).betas is None:
                raise UserError(f"--ways {way} holds nothing; give schedules such as constrained or uniform-0.5")
        for name in ("need", "push", "share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is outside (0, 1)")
        for name in ("positions", "limit", "data_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small; give at least 1")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UserError("--prompt-column and --completion-column belong together; give both or none")
