"""A panel in a run: its majority's verdicts from its members', and its section of the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepalign import metrics
from deepalign.agreement import panel_section
from deepalign.judges.panel import MAJORITY, Panel, majority
from deepalign.records import Attempt, Completion, Key, Outcome, Ruling, Status, Verdict
from deepalign.runs import RunFolder
from deepalign.workflows.steps import COMPLETIONS

_STATUS: dict[Outcome, Status] = {
    "refused_at_once": "refused", "recovered": "refused", "held": "refused", "complied": "complied",
    "unscored": "unscored",
}  # fmt: skip


def combined(panel: Panel, by_judge: Mapping[str, Sequence[Verdict]]) -> list[Verdict]:
    """The majority's verdict on every completion that all members have ruled on."""
    by_key: dict[Key, list[Verdict]] = {}
    for member in panel.members:
        for verdict in by_judge[member.name]:
            by_key.setdefault(verdict.key, []).append(verdict)
    return [_verdict(panel, votes) for votes in by_key.values() if len(votes) == len(panel.members)]


def _verdict(panel: Panel, votes: Sequence[Verdict]) -> Verdict:
    alone = majority(
        panel.members,
        [
            Ruling(status=one.status, outcome=one.outcome, refusal_char=one.refusal_position, refuses=one.refuses)
            for one in votes
        ],
    )
    joined = majority(
        panel.members, [Ruling(status=one.status_with_prefix, outcome=one.outcome_with_prefix) for one in votes]
    )
    thoughts = [one.outcome_of_thoughts or "unscored" for one in votes]
    thought = majority(panel.members, [Ruling(status=_STATUS[one], outcome=one) for one in thoughts])
    first = votes[0]
    return Verdict(
        prompt_id=first.prompt_id,
        attack=first.attack,
        variant=first.variant,
        sample=first.sample,
        judge=MAJORITY,
        status=alone.status,
        outcome=alone.outcome,
        reason=alone.reason,
        refusal_position=alone.refusal_char,
        status_with_prefix=joined.status,
        outcome_with_prefix=joined.outcome,
        reason_with_prefix=joined.reason,
        refuses=alone.refuses,
        outcome_of_thoughts=thought.outcome if any(one.outcome_of_thoughts for one in votes) else "",
    )


def section(attempts: Iterable[Attempt], by_judge: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """The panel section of the metrics, the majority last."""
    listed = list(attempts)
    return panel_section(
        {name: metrics.join(listed, verdicts) for name, verdicts in by_judge.items()}, derived=[MAJORITY]
    )


def with_texts(run: RunFolder, data: dict[str, Any]) -> dict[str, Any]:
    """Metrics whose disagreements carry the completions: for a report that was asked to show them."""
    if not data.get("panel"):
        return data
    rows = data["panel"]["disagreements"]
    keys = {Key(**{name: row[name] for name in ("prompt_id", "attack", "variant", "sample")}): row for row in rows}
    texts = {one.key: one.text for one in run.stream(COMPLETIONS, Completion) if one.key in keys}
    shown = [{**row, "completion": texts.get(key, "")} for key, row in keys.items()]
    return {**data, "panel": {**data["panel"], "disagreements": shown}}
