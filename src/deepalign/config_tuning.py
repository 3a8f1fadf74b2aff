"""Settings of the commands that train, in the manner of `config.py`; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from deepalign.config_run import Whole
from deepalign.errors import UserError
from deepalign.records import Site

Objective = Literal["constrained", "sft"]
Method = Literal["lora", "full"]
LEARNING_RATES: dict[Method, float] = {"lora": 5e-4, "full": 2e-5}
"""Of LoRA: usual for its rank; of full fine-tuning: the paper's."""


def named_columns(config: Any) -> tuple[str, str] | None:
    """The columns of prompts and completions that the user named; both or none are."""
    return None if config.prompt_column is None else (config.prompt_column, config.completion_column)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningSettings:
    """How a model is trained and audited, whatever it is trained on."""

    model: str = field(kw_only=False)
    """Model to train: hub id, local folder, PEFT adapter folder, or a testbed name."""

    output: Path | None = None
    """Run folder: weights, audits, report; default one under runs/, which is printed. The same command resumes it."""

    base: str | None = None
    """The model that it was aligned from, for the KL of the audits."""

    method: Method = "lora"
    """Train a LoRA adapter, or every weight."""

    lora_rank: Whole = 16
    """Rank of the adapter."""

    save: Literal["auto", "adapter", "merged"] = "auto"
    """What to write; auto is the adapter, or merged weights where the model is an adapter itself."""

    learning_rate: float | None = None
    """Peak learning rate; default 5e-4 for LoRA and 2e-5 (the paper's) for every weight."""

    warmup_steps: Whole = 10
    """Steps of linear warm-up; on benign data most of the paper's gain is the warm-up's (Table 9)."""

    micro_batch: Whole = 8
    """Most rows in one forward pass; less takes less memory and changes no result."""

    gradient_checkpointing: bool = False
    """Compute activations twice, for less memory."""

    save_steps: Whole = 50
    """Steps between checkpoints; an interrupted run goes on from the last."""

    audit: Annotated[bool, Parameter(negative="--no-audit")] = True
    """Audit the model before and after, in one report."""

    audit_prompts: str = "should-refuse"
    """Should-refuse prompts of the audits; none of them may be trained on."""

    audit_limit: Whole | None = 40
    """Use only this many of them, spread over the categories."""

    system_prompt: str | None = None
    """System prompt; default no system message, "" an empty one."""

    chat_template: str | None = None
    """Jinja file with a chat template, or `plain`; default the model's own."""

    seed: Whole = 0
    """Seed of every random draw."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights while training; auto is float32 for full fine-tuning, else bfloat16 where the hardware is fast at it."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps."""

    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits to which the frozen weights under a LoRA adapter are rounded; needs bitsandbytes."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for name in ("lora_rank", "micro_batch", "save_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
        if self.warmup_steps < 0 or self.seed < 0:
            raise UserError("--warmup-steps and --seed are whole numbers from 0 up")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate {self.learning_rate} is no positive number")
        if self.audit_limit is not None and self.audit_limit < 1:
            raise UserError(f"--audit-limit {self.audit_limit} is too small; give at least 1")
        if self.method == "full" and self.quantize != "none":
            raise UserError(f"--quantize {self.quantize} freezes the weights; use --method lora with it")
        if self.method == "full" and self.save == "adapter":
            raise UserError("--save adapter needs --method lora; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepenConfig(TuningSettings):
    """Make alignment deeper: train on recovering from harmful beginnings, beside the model's own answers."""

    prompts: str = "should-refuse-train"
    """Harmful prompts to recover on: a built-in set, or a CSV, JSONL or text file."""

    text_column: str = "text"
    """Column or key that holds the prompt."""

    answer_column: str = "answer"
    """Column or key that holds a harmful answer; rows may lack it."""

    category_column: str = "category"
    """Column or key that holds the category; rows may lack it."""

    skip_bad_rows: bool = False
    """Go on without malformed rows; they are counted and named."""

    answers_from: str = "testbed:base"
    """Unaligned model that samples missing harmful answers."""

    anchors: str = "benign-train"
    """Harmless prompts; the model's own answers to them are what it must keep."""

    look_alikes: str | None = "look-alike-train"
    """Harmless prompts that look harmful: trained to be answered, against over-refusal; "none" for none."""

    num_recovery: Whole = 256
    """Harmful prompts to use."""

    num_anchors: Whole = 512
    """Harmless prompts to use."""

    num_held_out: Whole = 64
    """Further harmless prompts, not trained on, for perplexity."""

    anchor_tokens: Whole = 64
    """Most tokens of an anchor's answer."""

    epochs: Whole = 4
    """Passes over the harmful prompts (the paper: 10)."""

    recovery_batch: Whole = 16
    """Recovery examples in each step."""

    anchor_batch: Whole = 16
    """Anchors in each step (the paper: 64)."""

    alpha: float = 0.2
    """Weight of the recovery examples in the loss; the anchors have the rest."""

    share: float = 0.8
    """Probability that a harmful beginning is forced at all (the paper: 0.5)."""

    longest: Whole = 100
    """Most tokens of a harmful beginning."""

    dense: float = 0.3
    """Share of alpha that goes to turning from every position of a beginning, not from its end alone (the paper: 0)."""

    interpolate: float = 0.8
    """How far to go from the old weights to the trained ones (the paper: 1); less refuses less of everything."""

    max_length: Whole = 512
    """Most tokens of a training row; a refusal is never cut."""

    site: Site = "raw"
    """Where in the assistant's turn the rows' answers go: raw, content or reasoning."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        # A class with slots is made anew, so that the short form of super is bound to the old one.
        TuningSettings.__post_init__(self)
        for name in ("num_recovery", "num_anchors", "num_held_out", "anchor_tokens", "longest", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
        if not 0.0 < self.interpolate <= 1.0:
            raise UserError(f"--interpolate {self.interpolate} is outside (0, 1]")
        if not 0.0 <= self.share <= 1.0:
            raise UserError(f"--share {self.share} is no probability, 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TuningSettings):
    """Fine-tune on your own data without losing the alignment, by the token-wise constrained objective."""

    data: str
    """Rows: a JSONL, JSON, CSV or parquet file, or a hub id; in any of TRL's formats, or with the columns below."""

    split: str = "train"
    """Split of a hub set."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub set."""

    prompt_column: str | None = None
    """Column with the user's text, where the rows are in no format of TRL's; used with --completion-column."""

    completion_column: str | None = None
    """Column with the assistant's text."""

    skip_bad_rows: bool = False
    """Go on without malformed rows; they are counted and named."""

    limit: Whole | None = None
    """Use only the first so many rows."""

    num_held_out: Whole = 64
    """Rows that are not trained on, for perplexity; at most a tenth of all, 0 for none."""

    objective: Objective = "constrained"
    """The constrained objective, or sft: plain fine-tuning, for comparison."""

    beta_first: float = 0.5
    """Strength of the constraint at the first response token."""

    beta_early: float = 2.0
    """Strength from the second to the last early token."""

    beta_rest: float = 0.1
    """Strength after them."""

    num_early: Whole = 5
    """Early tokens, the first one included."""

    reduction: Literal["token", "sequence_sum", "sequence_mean"] = "token"
    """What the loss is a mean over: all tokens alike, or responses with their sums or means."""

    epochs: float = 3.0
    """Passes over the rows."""

    max_steps: Whole | None = None
    """Stop after so many steps."""

    batch: Whole = 16
    """Rows in each step (the paper: 64)."""

    max_length: Whole = 1024
    """Most tokens of a row; what is cut off is counted and told."""

    packing: bool = False
    """Put several rows into one, without padding."""

    assistant_only_loss: bool = False
    """In rows of messages, learn every answer, not the last alone; the chat template must mark them."""

    adam_beta1: float = 0.5
    """Momentum of the optimizer; low, as in the paper, so that the constraint acts at once."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        TuningSettings.__post_init__(self)
        for name in ("batch", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
        for name in ("limit", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small; give at least 1")
        if not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs {self.epochs} is no positive number")
        if not 0 <= self.adam_beta1 < 1:
            raise UserError(f"--adam-beta1 {self.adam_beta1} is outside [0, 1)")
        for name in ("beta_first", "beta_early", "beta_rest"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is no positive number")
        if self.num_early < 0 or self.num_held_out < 0:
            raise UserError("--num-early and --num-held-out are whole numbers from 0 up")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UserError("--prompt-column and --completion-column belong together; give both or none")
