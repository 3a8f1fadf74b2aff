"""Settings of the commands that work on finished runs, in the manner of `config.py`; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from deepalign.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """Judge the completions of a run again, without generating."""

    run: Path = field(kw_only=False)
    """Run folder."""

    judge: str = "refusal"
    """Judge: a built-in name, rubric:MODEL@URL, module:Name, or scripted:FILE; several with commas make a panel."""

    device: str = "auto"
    """What a judge that is a model runs on: auto, cpu, cuda, cuda:1, mps, or sharded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights of a judge that is a model; auto is bfloat16 where the hardware is fast at it."""

    show_completions: bool = False
    """Show completions in the report instead of redacting them."""

    batch_export: Path | None = None
    """Instead of judging, write the requests of a judge on an endpoint to this file, as OpenAI's batch API takes it."""

    batch_import: Path | None = None
    """Judge by the results of such a batch; what has none stays open."""

    def __post_init__(self) -> None:
        if self.batch_export is not None and self.batch_import is not None:
            raise UserError("--batch-export and --batch-import are two steps; give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Join the shards of an audit into one run, with metrics and report."""

    shards: tuple[Path, ...] = field(kw_only=False)
    """Run folders of all shards, in any order."""

    output: Path | None = None
    """Run folder of the whole; default the shards' name without -shard-I-of-N."""

    show_completions: bool = False
    """Show completions in the report instead of redacting them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write the report of one run anew, or one of several; utility runs join the audits of the same weights."""

    runs: tuple[Path, ...] = field(kw_only=False)
    """Run folders."""

    output: Path | None = None
    """HTML file; default report.html in the run folder, or comparison.html in the first."""

    figures: Annotated[bool, Parameter(negative="--no-figures")] = True
    """Also write the figures as SVG and PNG files, in a folder beside the page."""

    show_completions: bool = False
    """Show completions in the report instead of redacting them."""
