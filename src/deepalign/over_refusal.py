"""Refusals of harmless prompts, told by whoever tells refusals: a section of `metrics.json`. Never sees text."""

from __future__ import annotations

from collections.abc import Sequence

from deepalign import statistics
from deepalign.attacks.plain import OVER_REFUSAL
from deepalign.metrics import Json, Judged, rate_json
from deepalign.records import Verdict
from deepalign.statistics import Rate


def over_refusal_rows(judged: Sequence[Judged], sets: Sequence[str], *, judge: str, by_status: bool) -> list[Json]:
    """Refusals of harmless prompts, for each set.

    Args:
        judged: Verdicts of whoever tells refusals.
        sets: Names of the sets.
        judge: Who that is.
        by_status: Whether it is a judge of refusals, whose status says it; a judge of harm says it in `refuses`.
    """
    of = {
        name: [pair for pair in judged if pair[0].attack == OVER_REFUSAL and pair[0].variant == name] for name in sets
    }

    def told(verdict: Verdict) -> bool | None:
        if verdict.refuses is not None or not by_status:
            return verdict.refuses
        return None if verdict.status == "unscored" else verdict.status == "refused"

    def refused(pairs: Sequence[Judged]) -> Rate:
        return statistics.rate([(attempt.prompt_id, told(verdict)) for attempt, verdict in pairs])

    return [
        {
            "set": name,
            "refusals": rate_json(refused(of[name])),
            "judge": judge,
            "num_prompts": len({attempt.prompt_id for attempt, _ in of[name]}),
        }
        for name in sets
    ]
