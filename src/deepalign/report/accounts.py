"""Tables of what a run left out and how it was set: what a reader needs before believing the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepalign.report.finetuning_tables import left_out_cells_table
from deepalign.report.reading import (
    PROBES,
    SECTION_NAMES,
    Cell,
    Metrics,
    absence,
    block,
    legible,
    only_tuned,
    only_used,
    rows,
    visible,
    whole,
)
from deepalign.report.sections import Table, table_of
from deepalign.report.utility_tables import failed_table


def left_out_tables(metrics: Metrics) -> list[Table]:
    """What was not scored, what failed and what was skipped."""
    counted = [
        table_of(
            title,
            ("attack", "reason", "count"),
            [
                (visible(row.get("attack", "")), visible(row.get("reason", "")), whole(row.get("count")))
                for row in rows(metrics, name)
            ],
            note,
        )
        for name, title, note in (
            ("unscored", "Unscored completions", "The judge could not decide: counted in no rate."),
            ("failed", "Failed attempts", "No completion came back: counted in no rate."),
        )
    ]
    skipped = table_of(
        "Skipped prompts",
        ("attack", "prompt", "k", "answer tokens", "reason"),
        [
            (
                visible(row.get("attack", "prefill")),
                visible(row.get("prompt_id", "")),
                whole(row.get("k")),
                whole(row.get("answer_tokens")),
                visible(row.get("reason", "")),
            )
            for row in rows(metrics, "skipped")
        ],
        "The reference answer is too short to give k tokens.",
    )
    return [table for table in (*counted, skipped, left_out_cells_table(metrics), failed_table(metrics)) if table]


def run_card_table(metrics: Metrics) -> Table | None:
    """Every setting of the run and every property of its models, as name and value."""
    facts: list[tuple[Cell, ...]] = []
    for role, model in block(metrics, "models").items():
        if isinstance(model, Mapping):
            facts += _facts(model, f"{role} model: ")
    facts += _facts(block(metrics, "run_card"))
    return table_of("Run card", ("setting", "value"), facts, "")


def tuning_table(list_of_metrics: Sequence[Metrics]) -> Table | None:
    """What a run was trained on and what it kept; for the runs that bring it."""
    facts = [fact for metrics in list_of_metrics for fact in _facts(block(metrics, "tuning"))]
    note = (
        "A perplexity ratio of 1 means that the held-out answers are as probable as before; above it, something was "
        "lost."
    )
    return table_of("What was trained, and what was kept", ("measure", "value"), facts, note)


def not_tested_table(metrics: Metrics) -> Table | None:
    """The probes that this run left out, with the reason."""
    found: list[tuple[Cell, ...]] = [
        (name, visible(reason)) for section, name in SECTION_NAMES.items() if (reason := absence(metrics, section))
    ]
    if only_tuned(metrics):
        found.append(("Audit: " + ", ".join(PROBES.values()), "no part of a run that fine-tunes"))
    elif only_used(metrics):
        found.append(("Audit: " + ", ".join(PROBES.values()), "no part of a run that measures utility"))
    return table_of("Not tested", ("probe", "reason"), found, "Absence of a number is not evidence of safety.")


def _facts(data: Mapping[str, Any], prefix: str = "") -> list[tuple[Cell, ...]]:
    found: list[tuple[Cell, ...]] = []
    for name, value in data.items():
        label = f"{prefix}{visible(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            found += _facts(value, f"{label}: ")
        else:
            found.append((label, _fact(value)))
    return found


def _fact(value: object) -> Cell:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        # A token may be a space or a line break: quoted, it can be seen.
        return ", ".join(f'"{visible(item)}"' if isinstance(item, str) else str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return legible(value)
    return str(value)
