"""What judging cost: noted in the run's manifest while it is spent, and told when a command ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepalign.judges import Judge
from deepalign.judges.rubric import RubricJudge
from deepalign.progress import Progress
from deepalign.runs import MANIFEST, RunFolder

NOTED = "judge_spending"
_NOTE_EVERY_SECONDS = 20.0


@contextmanager
def accounted(run: RunFolder, judge: Judge, progress: Progress) -> Iterator[Progress]:
    """Note what a judge spends, now and then and at the end, however the end comes.

    Yields:
        The progress to report to meanwhile.
    """
    if not isinstance(judge, RubricJudge) or not (run / MANIFEST).exists():
        yield progress
        return
    before = run.manifest.get(NOTED, {}).get(judge.name, {})
    start = dataclasses.asdict(judge.spending)
    noted = time.monotonic()

    def note() -> None:
        spent = dataclasses.asdict(judge.spending)
        total = {name: before.get(name, 0) + count - start[name] for name, count in spent.items()}
        cost = judge.prices.cost(total["prompt_tokens"], total["completion_tokens"])
        run.note(**{NOTED: {judge.name: {**judge.account(), **total, "cost": cost}}})

    def watched(stage: str, done: int, total: int) -> None:
        nonlocal noted
        progress(stage, done, total)
        if time.monotonic() - noted >= _NOTE_EVERY_SECONDS:
            noted = time.monotonic()
            note()

    try:
        yield watched
    finally:
        note()


def told(folder: Path) -> list[str]:
    """One line for each judge of a run that asked a server, over all sittings."""
    lines = []
    noted: dict[str, dict[str, Any]] = RunFolder(folder).manifest.get(NOTED, {})
    for name, spent in noted.items():
        parts = [f"{spent['calls']} calls, {spent['from_cache']} replies from the cache"]
        parts.append(f"{spent['prompt_tokens']} tokens in, {spent['completion_tokens']} out")
        if spent["without_counts"]:
            parts.append(f"{spent['without_counts']} replies told no token counts")
        if spent["failed"]:
            parts.append(f"{spent['failed']} failed for good")
        if spent["cost"] is not None:
            parts.append(f"cost {spent['cost']:.4g}")
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines
