"""Tables of measured utility, for `document_audit.py`."""

from __future__ import annotations

from typing import Any

from grid_figures import rate


def utility_tasks(measured: dict[str, Any]) -> str:
    """The score of each built-in task on each model, and the mean."""
    models = measured["models"]
    lines = ["", "", "| task | " + " | ".join(f"`{one['model']}`" for one in models) + " |"]
    lines.append("|---" * (len(models) + 1) + "|")
    for place, row in enumerate(models[0]["utility"]["tasks"]):
        here = [one["utility"]["tasks"][place] for one in models]
        lines.append(f"| {row['task']} | " + " | ".join(cell(one) for one in here) + " |")
    means = [one["utility"]["overall"] for one in models]
    lines.append("| **mean** | " + " | ".join(interval(one) for one in means) + " |")
    return "\n".join([*lines, "", conditions(measured), "", ""])


def utility_side_by_side(measured: dict[str, Any]) -> str:
    """Attack success, over-refusal and utility of each model."""
    lines = ["", "", "| | ASR, asked plainly | ASR, prefilled, worst k | over-refusal | utility | not beaten on both |"]
    lines.append("|---" * 6 + "|")
    for one in measured["models"]:
        place = one["trade_off"]
        lines.append(
            f"| `{one['model']}` | {rate(place['plain_asr'])} | {rate(place['asr'])}, {place['asr_at']} | "
            f"{rate(place['over_refusal'])} | {interval(place['utility'])} | {'yes' if place['pareto'] else 'no'} |"
        )
    return "\n".join([*lines, ""])


def utility_answers(measured: dict[str, Any]) -> str:
    """How many answers to the tasks refuse, and how long they are."""
    models = measured["models"]
    lines = ["", "", "| task | " + " | ".join(f"`{one['model']}`: refused | words" for one in models) + " |"]
    lines.append("|---" * (2 * len(models) + 1) + "|")
    for task in models[0]["answers"]:
        here = [one["answers"][task] for one in models]
        lines.append(f"| {task} | " + " | ".join(f"{rate(x['refused'])} | {x['median_words']:g}" for x in here) + " |")
    return "\n".join([*lines, ""])


def cell(row: dict[str, Any]) -> str:
    """A score with its parts, and how many answers could not be read."""
    unread = row["score"]["num_no_answer"]
    return rate(row["score"]) + (f"; {unread} not read" if unread else "")


def interval(score: dict[str, Any]) -> str:
    """A mean over tasks with its interval, percent."""
    low, high = score["ci95"]
    return f"{100 * score['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def conditions(measured: dict[str, Any]) -> str:
    """What the figures rest on, in a line."""
    first = measured["models"][0]
    section, card = first["utility"], first["run_card"]
    return (
        f"The first {section['limit']} items of each task, asked {section['asked']}, lm-evaluation-harness "
        f"{section['lm_eval']}; {card['hardware']}, torch {card['versions']['torch']}, commit {card['commit']}."
    )


UTILITY_FIGURES = {
    "utility-answers": utility_answers,
    "utility-tasks": utility_tasks,
    "utility-side-by-side": utility_side_by_side,
}
