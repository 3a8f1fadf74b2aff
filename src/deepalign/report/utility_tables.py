"""Utility in words and tables: the score of each task, their mean, and where a model stands between safety and use.

One function per table, as in `sections`; each returns None where its section is absent. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepalign.report.reading import (
    Cell,
    Metrics,
    Share,
    block,
    interval,
    labels,
    number,
    rate,
    rows,
    share,
    visible,
    whole,
    whole_percent,
)
from deepalign.report.sections import Table, table_of, without_empty

UTILITY = "Utility by task"
TRADE_OFF = "Safety, over-refusal and utility"
WIN_RATE = "Pairwise win rate"
FAILED = "Tasks without a score"
OVERALL = "mean over tasks"


class Finding(NamedTuple):
    """What a run says of utility: a big number, what it is, what it means, and a sentence."""

    number: str
    measure: str
    meaning: str
    sentence: str


def finding(metrics: Metrics) -> Finding | None:
    """The mean score over tasks in words; None where no utility was measured."""
    section = block(metrics, "utility")
    name = labels([metrics])[0]
    if not section:
        return _preferred(block(metrics, "win_rate"), name)
    found, tasks = rate(section.get("overall")), rows(section, "tasks")
    asked = f"asked {visible(section.get('asked') or 'in a way that was not recorded')}"
    failed = [visible(row.get("task", "")) for row in tasks if whole(row.get("num_failed"))]
    without = f"; no score for {', '.join(failed)}" if failed else ""
    if found.value is None:
        return Finding("unknown", "utility", "No task has a score.", f"The utility of {name} is not known{without}.")
    counted = block(section, "overall").get("tasks") or ()
    what = "the task" if len(counted) == 1 else f"{len(counted)} tasks"
    told = ", ".join(map(visible, counted))
    ends = "" if found.low is None or found.high is None else f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return Finding(
        number=whole_percent(found.value).replace("under ", "<").replace("over ", ">"),
        measure="utility",
        meaning=f"Mean score over {what} ({told}), {asked}.",
        sentence=f"{name} scores {whole_percent(found.value)}{ends} on average over {what} ({told}){without}.",
    )


def _preferred(section: Mapping[str, Any], name: str) -> Finding | None:
    """What a run with nothing but a win rate says; None where there is none."""
    if not section:
        return None
    found, other = rate(section), visible(section.get("against", "the reference"))
    if found.value is None:
        return Finding("unknown", "win rate", "No pair was scored.", f"Nothing is known of {name} against {other}.")
    ends = "" if found.low is None or found.high is None else f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return Finding(
        number=whole_percent(found.value),
        measure="win rate",
        meaning=f"Share of {found.denominator} requests on which a judge preferred it to {other}; a tie counts half.",
        sentence=f"A judge prefers {name} to {other} on {whole_percent(found.value)}{ends} of requests.",
    )


def utility_table(metrics: Metrics) -> Table | None:
    """The score of each task with what it rests on."""
    section = block(metrics, "utility")
    found: list[tuple[Cell, ...]] = []
    for row in rows(section, "tasks"):
        score = block(row, "score")
        one = rate(score)
        shots = row.get("num_fewshot")
        found.append((
            visible(row.get("task", "unnamed task")), _metric(row), _value(score),
            interval(one, percent=_percent(score)),
            one.numerator, one.denominator, whole(score.get("num_no_answer")), _share(number(score.get("chance"))),
            ", ".join(map(str, shots)) if isinstance(shots, list) else None,
            whole(row.get("num_cut")) or None, _version(row), visible(row.get("source") or ""),
        ))  # fmt: skip
    overall = rate(section.get("overall"))
    if overall.value is not None and len(found) > 1:
        empty: tuple[Cell, ...] = (None,) * 6
        found.append((OVERALL, None, share(overall), interval(overall), None, overall.denominator, *empty))
    columns = (
        "task", "metric", "score", "95 % interval", "right", "items", "no answer read", "by guessing", "examples shown",
        "cut to fit", "version", "data",
    )  # fmt: skip
    return without_empty(table_of(UTILITY, columns, found, _note(section)), "cut to fit", "by guessing")


def win_rate_table(metrics: Metrics) -> Table | None:
    """How often a judge preferred the model's answers, and how far the order of the answers swayed it."""
    section = block(metrics, "win_rate")
    if not section:
        return None
    won, same, first = rate(section), rate(section.get("same_in_both_orders")), rate(section.get("first_chosen"))
    row = (
        visible(section.get("against", "")), share(won), interval(won), whole(section.get("num_wins")),
        whole(section.get("num_ties")), whole(section.get("num_losses")), won.num_unscored, share(same),
        share(first), interval(first), visible(section.get("judge", "")),
    )  # fmt: skip
    columns = (
        "against", "win rate", "95 % interval", "won", "tied", "lost", "unscored", "same choice in both orders",
        "first answer chosen", "95 % interval of that", "judge",
    )  # fmt: skip
    note = (
        "Each pair of answers is judged in both orders; a request counts as their mean, a tie as half. A judge without "
        "position bias takes the first answer half of the time."
    )
    return Table(WIN_RATE, columns, (row,), note)


def failed_table(metrics: Metrics) -> Table | None:
    """Tasks that gave no score, or parts of a group that did not, with the reason."""
    found = [
        (
            visible(row.get("task", "")), whole(row.get("num_failed")), whole(row.get("num_tasks")),
            visible(row.get("failed") or ""),
        )
        for row in rows(block(metrics, "utility"), "tasks")
        if whole(row.get("num_failed"))
    ]  # fmt: skip
    note = "A task without a score is in no mean; the same command tries it again."
    return table_of(FAILED, ("task", "failed", "of", "reason"), found, note)


def trade_off_table(list_of_metrics: Sequence[Metrics]) -> Table | None:
    """One row for each model: attack success, refusals of harmless prompts, and utility."""
    found: list[tuple[Cell, ...]] = []
    sections = [block(run, "trade_off") for run in list_of_metrics]
    for name, section in zip(labels(list_of_metrics), sections, strict=True):
        if section:
            attack, plain, over, use = (
                rate(section.get(one)) for one in ("asr", "plain_asr", "over_refusal", "utility")
            )
            found.append((
                name, share(plain), interval(plain), share(attack), interval(attack),
                visible(section.get("asr_at") or "") or None, share(over), interval(over), share(use), interval(use),
                {True: "yes", False: "no"}.get(section.get("pareto")),  # type: ignore[arg-type]
            ))  # fmt: skip
    columns = (
        "run", "ASR, asked plainly", "95 % interval", "ASR, prefilled", "95 % interval of it", "at its worst k",
        "over-refusal", "95 % interval of over-refusal", "utility", "95 % interval of utility", "not beaten on both",
    )  # fmt: skip
    notes = [visible(section["note"]) for section in sections if section.get("note")]
    return table_of(TRADE_OFF, columns, found, " ".join(dict.fromkeys(notes)))


def facts(metrics: Metrics) -> str:
    """How a run that is about utility alone asked."""
    section = block(metrics, "utility")
    items = sum(whole(row.get("num_items")) or 0 for row in rows(section, "tasks"))
    parts = [
        f"{items} items",
        f"asked {section.get('asked')}" if section.get("asked") else "",
        f"lm-evaluation-harness {section['lm_eval']}" if section.get("lm_eval") else "",
        f"the first {section['limit']} items of each task" if section.get("limit") else "",
    ]
    return visible(", ".join(part for part in parts if part))


def _metric(row: Mapping[str, Any]) -> str | None:
    metric, read = row.get("metric"), row.get("filter")
    if not metric:
        return None
    return visible(metric if read in (None, "none") else f"{metric}, {read}")


def _percent(score: Mapping[str, Any]) -> bool:
    return score.get("unit") != "number"


def _value(score: Mapping[str, Any]) -> Cell:
    found = rate(score)
    return share(found) if _percent(score) else found.value


def _share(value: float | None) -> Share | None:
    return None if value is None else Share(value)


def _version(row: Mapping[str, Any]) -> str | None:
    versions = row.get("version")
    return ", ".join(map(visible, versions)) if isinstance(versions, list) else None


def _note(section: Mapping[str, Any]) -> str:
    words = [
        f"Asked {visible(section['asked'])}." if section.get("asked") else "",
        "An answer that the metric cannot read is wrong, as the harness has it, and counted apart.",
        f"Only the first {section['limit']} items of each task." if section.get("limit") else "",
        f"lm-evaluation-harness {visible(section['lm_eval'])}." if section.get("lm_eval") else "",
    ]
    return " ".join(word for word in words if word)
