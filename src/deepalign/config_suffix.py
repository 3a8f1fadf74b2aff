"""Settings of the suffix search, in the manner of `config.py`; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from deepalign.config_run import Whole
from deepalign.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SuffixConfig:
    """Search suffixes that make a model answer what it should refuse (GCG), to measure it with."""

    model: str = field(kw_only=False)
    """Model to attack: hub id, local folder, adapter folder, or a testbed name; its weights are needed."""

    output: Path | None = None
    """Run folder; default one under runs/, which is printed. The same command resumes it."""

    prompts: str = "should-refuse-train"
    """Should-refuse prompts to search on: a built-in set, or a CSV, JSONL or text file."""

    text_column: str = "text"
    """Column or key of --prompts that holds the prompt."""

    answer_column: str = "answer"
    """Column or key that holds the beginning of a harmful answer, the target; rows may lack it."""

    skip_bad_rows: bool = False
    """Go on without the malformed rows of --prompts; they are counted and named."""

    behaviours: Whole = 50
    """Use this many of them, spread over the categories (the paper: 50)."""

    per_prompt: bool = False
    """A suffix for each prompt instead of one for all."""

    target: str = "Sure, here is"
    """What the answer is to begin with, for prompts without an answer."""

    target_tokens: Whole = 16
    """Tokens of a prompt's answer that are its target."""

    answers_from: str | None = None
    """Model that samples missing answers, whose beginnings are then the targets; default --target."""

    runs: Whole = 1
    """Searches, each with a seed of its own (the paper: 10, of which it reports the best three)."""

    steps: Whole = 500
    """Most steps of a search."""

    width: Whole = 512
    """Candidates of a step."""

    top_k: Whole = 256
    """Tokens at each place that candidates are drawn from."""

    length: Whole = 20
    """Tokens of a suffix."""

    init: str | None = None
    """Suffix to begin with, whose tokens are as many as the result's; default marks such as "! ! !"."""

    order: Literal["uniform", "greedy"] = "uniform"
    """Draw candidates among the top tokens, or take them in the gradient's own order (arXiv 2410.15362)."""

    replace: Whole = 1
    """Tokens that a candidate changes at first."""

    replace_steps: Whole = 0
    """Steps over which these fall to one; 0 keeps them."""

    draft: str | None = None
    """Smaller model that reads all candidates first, so that the model reads few of them (arXiv 2403.01251)."""

    merge: Whole = 0
    """So many of a step's best candidates are also tried together (arXiv 2405.21018)."""

    buffer: Whole = 0
    """Suffixes kept to go on from; 0 goes on from the best candidate of the step."""

    momentum: float = 0.0
    """Share of the gradient that comes from earlier steps (arXiv 2405.01229)."""

    at_once: bool = False
    """Search on all prompts from the first step; default one after the other, the next when targets are reached."""

    behaviours_per_step: Whole | None = None
    """Choose a step's candidates on so many prompts, drawn anew, before all read them; default on all."""

    mellowmax: float | None = None
    """Sharpness of a mellowmax over the target's tokens in place of their mean."""

    allow_non_ascii: bool = False
    """Also use tokens that are not plain ASCII."""

    early_stop: Annotated[bool, Parameter(negative="--no-early-stop")] = True
    """Stop when every target is the greedy answer and generated text confirms it."""

    confirm_tokens: Whole = 32
    """Tokens that are generated from text to confirm it."""

    system_prompt: str | None = None
    """System prompt; default no system message, "" an empty one."""

    chat_template: str | None = None
    """Jinja file with a chat template, or `plain`; default the model's own."""

    seed: Whole = 0
    """Seed of the first search; the next have the next."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights; auto is bfloat16 where the hardware is fast at it."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        sizes = (
            "behaviours",
            "target_tokens",
            "runs",
            "steps",
            "width",
            "top_k",
            "length",
            "replace",
            "confirm_tokens",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
        for name in ("buffer", "seed", "replace_steps", "merge"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give 0 or more")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum {self.momentum} is outside [0, 1)")
        if self.mellowmax is not None and not self.mellowmax > 0:
            raise UserError(f"--mellowmax {self.mellowmax} is no number above 0")
        if self.init is not None and not self.init.strip():
            raise UserError('--init is empty; give a suffix such as "! ! ! !"')
        if not self.target.strip():
            raise UserError("--target is empty; give what an answer begins with")
