"""What an audit leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from deepalign.runs import RunResult


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult(RunResult):
    """What an audit leaves behind; a shard has no metrics, and its run folder waits to be merged."""

    shard: str | None = None
    """Which part of an audit this is; None for the whole."""
