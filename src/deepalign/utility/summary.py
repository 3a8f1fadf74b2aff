"""Finished tasks to the rows of metrics.json: one for each name that was asked, and the mean over them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from deepalign.utility.harness import Asked
from deepalign.utility.scores import FinishedTask, combined_interval, pooled


def task_row(asked: Asked, members: Sequence[FinishedTask]) -> dict[str, Any]:
    """One name as it was asked: its score, what it rests on, and what failed."""
    done = [one for one in members if one.main]
    score = pooled([one.scores[0] for one in done], by_size=asked.by_size)
    main = done[0].main if done else None
    failed = [f"{one.task}: {one.failed}" if asked.is_group else one.failed for one in members if one.failed]
    hashes = [one.data_hash for one in members]
    return {
        "task": asked.name,
        "metric": main["metric"] if main else None,
        "filter": main["filter"] if main else None,
        "score": score,
        "num_tasks": len(asked.leaves),
        "num_failed": len(failed),
        "failed": failed[0] if failed else "",
        "num_items": sum(one.num_items for one in members),
        "num_available": sum(one.num_available for one in members),
        "num_cut": sum(one.num_cut for one in members),
        "num_fewshot": sorted({one.num_fewshot for one in members}),
        "version": sorted({one.version for one in members}),
        "source": members[0].source if members else "",
        "data_hash": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        "members": [
            {"task": one.task, "score": one.main, "failed": one.failed, "others": list(one.scores[1:])}
            for one in members
        ],
    }


def overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean score over tasks, each alike, of those whose score is a share where more is better; None without one."""
    known = [row for row in rows if row["score"] and row["score"]["unit"] == "share" and not row["num_failed"]]
    known = [row for row in known if row["score"]["higher_is_better"]]
    if not known:
        return None
    scores = [row["score"] for row in known]
    weights = [1 / len(scores)] * len(scores)
    return {
        "rate": sum(one["rate"] for one in scores) / len(scores),
        "ci95": combined_interval(scores, weights),
        "numerator": None,
        "denominator": sum(one["denominator"] for one in scores),
        "num_unscored": sum(one["num_unscored"] for one in scores),
        "tasks": [row["task"] for row in known],
    }
