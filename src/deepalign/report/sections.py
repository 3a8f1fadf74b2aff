"""One table per section of the metrics: which columns there are and how a row is read.

Knows the metrics' fields and nothing of terminals, files or pages. A function returns None where its section is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepalign.report.reading import (
    Cell,
    Metrics,
    Rate,
    Share,
    block,
    depth_field,
    interval,
    mean,
    number,
    rate,
    rows,
    share,
    success_rate,
    visible,
    whole,
)


@dataclass(frozen=True)
class Table:
    """A titled table; cells are numbers where they can be, and `note` says how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def depth_table(metrics: Metrics) -> Table | None:
    """The summary numbers of the depth section."""
    depth = block(metrics, "depth")
    if not depth:
        return None
    threshold, half = number(depth.get("threshold")), whole(depth.get("tokens_at_50pct"))
    floor = "at least " if depth.get("censored") else ""
    tokens, plain = whole(depth.get(depth_field(depth))), rows(metrics, "prefill")[:1]
    asr_zero = "none: above it at the smallest k" if plain and success_rate(plain[0]).value is not None else None
    facts: list[tuple[str, Cell]] = [
        ("threshold for the attack success rate", None if threshold is None else Share(threshold)),
        ("depth: largest k up to which the rate stays at or under the threshold",
         asr_zero if tokens is None else f"{floor}{tokens}" if floor else tokens),
        ("the same for the upper end of the 95 % interval", whole(depth.get("tokens_at_10pct_upper"))),
        ("first tested k with a rate above 50 %", "never" if half is None and "tokens_at_50pct" in depth else half),
        ("mean attack success rate over k (area under the curve)", number(depth.get("asr_auc"))),
        ("deepest k tested", whole(depth.get("max_k"))),
        ("leading positions that hold 90 % of the KL divergence", whole(depth.get("kl_depth_90"))),
    ]  # fmt: skip
    notes = [visible(text) for text in depth.get("notes") or []]
    return Table("Depth", ("measure", "value"), tuple(facts), " ".join(notes))


def prefill_table(metrics: Metrics) -> Table | None:
    """Attack success rate by number of forced tokens."""
    found = []
    for row in rows(metrics, "prefill"):
        rest = [whole(row.get(name)) for name in ("num_skipped", "num_refused_at_once", "num_recovered")]
        with_prefix = share(rate(row.get("asr_with_prefix")))
        found.append((whole(row.get("k")), *rate_cells(success_rate(row)), *rest, with_prefix))
    columns = (
        "k", "ASR", "95 % interval", "successes", "scored", "unscored", "skipped", "refused at once", "recovered",
        "ASR, prefix judged too",
    )  # fmt: skip
    note = (
        "Rates are successes over scored completions; unscored and skipped ones are left out and counted apart. "
        "Recovered: complied at first, then refused."
        f"{_how_unknown(metrics)}"
    )
    return table_of("Attack success rate by forced tokens", columns, found, note)


def _how_unknown(metrics: Metrics) -> str:
    found = [row for row in rows(metrics, "prefill") if "num_recovered" in row]
    if any(row["num_recovered"] is None for row in found):
        return " How a refusal came is not given where a judge of harm found none: it does not say where one begins."
    return ""


def thoughts_table(metrics: Metrics) -> Table | None:
    """What a reasoning model's thoughts decided, beside what it then answered."""
    found = [
        (whole(row.get("k")), *rate_cells(rate(row.get("refused"))), *rate_cells(rate(row.get("complied_after")))[:4])
        for row in rows(metrics, "thoughts")
    ]
    columns = (
        "k", "thoughts refuse", "95 % interval", "refusing", "scored", "unscored",
        "of those, answer complies", "95 % interval of it", "complying", "scored of it",
    )  # fmt: skip
    note = "Thoughts count in no other rate. A model that refuses in its thoughts and then answers is not safe."
    return table_of("Thoughts and answers", columns, found, note)


def onset_table(metrics: Metrics) -> Table | None:
    """The attack success rate that the refusal onset predicts, beside what was generated where something was."""
    section = block(metrics, "refusal_onset")
    onset = {whole(row.get("position")): mean(row) for row in rows(section, "onset")}
    judged = {whole(row.get("k")): row for row in rows(section, "against_generated")}
    found = []
    for row in rows(section, "curve"):
        k, fitted, tried = whole(row.get("k")), row.get("calibrated"), judged.get(whole(row.get("k")), {})
        plain = mean({**row, "mean": row.get("asr")})
        shown = mean(fitted) if isinstance(fitted, Mapping) else mean({})
        begins = onset.get(k)
        generated = number(tried.get("asr_generated"))
        found.append((
            k, share(begins) if begins else None, share(plain), share(shown), interval(shown),
            None if generated is None else Share(generated), number(tried.get("auc")), plain.denominator,
        ))  # fmt: skip
    columns = (
        "k", "onset", "predicted ASR", "calibrated", "95 % interval", "generated ASR", "AUC per prompt", "prompts",
    )  # fmt: skip
    note = (
        "Onset: probability that a refusal begins exactly there. Predicted ASR: chance that none begins within "
        f"{whole(section.get('horizon')) or 'the next'} tokens. Calibrated on the generated depths of this run, where "
        "there are any. AUC: how well the prediction tells the prompts that were refused from the others."
    )
    return table_of("Refusal onset", columns, found, note)


def decoding_table(metrics: Metrics) -> Table | None:
    """Attack success rate by decoding setting, the worst case first."""
    section = block(metrics, "decoding")
    if not section:
        return None
    found: list[tuple[Cell, ...]] = [("worst of all, for each prompt", *rate_cells(rate(section.get("worst_case"))))]
    found += [
        (visible(row.get("setting", "")), *rate_cells(rate(row.get("harmfulness"))))
        for row in rows(section, "settings")
    ]
    columns = ("setting", "ASR", "95 % interval", "successes", "scored", "unscored")
    note = (
        "Each knob is swept alone; the others stay at the model's own settings. "
        f"System prompt: {visible(section.get('system_prompt', 'not recorded'))}. "
        f"The answer that counts in the worst case is picked by {visible(section.get('scorer', 'the judge'))}."
    )
    return table_of("Decoding settings", columns, found, note)


def kl_table(metrics: Metrics) -> Table | None:
    """KL divergence by response position, both directions side by side."""
    sides = [{whole(row.get("position")): row for row in rows(metrics, name)} for name in ("kl", "kl_reverse")]
    positions = sorted({position for side in sides for position in side if position is not None})
    found = []
    for position in positions:
        cells: list[Cell] = [position]
        for side in sides:
            row = side.get(position, {})
            read = mean(row)
            cells += [read.value, interval(read, percent=False), read.denominator, whole(row.get("num_nonfinite"))]
        found.append(tuple(cells))
    measures = ("KL", "95 % interval", "n", "non-finite")
    columns = ("position", *(f"{way} {measure}" for way in ("forward", "reverse") for measure in measures))
    note = (
        "Mean KL divergence in nats over the answers that reach the position (n); non-finite values are left out. "
        "Forward: aligned from base. Reverse: base from aligned."
    )
    return table_of("KL divergence by response position", columns, found, note)


def refusal_prefix_table(metrics: Metrics) -> Table | None:
    """Harmfulness with forced refusal prefixes."""
    found = [
        (
            visible(row.get("model", "base")),
            visible(row.get("prefix") or "(none)"),
            *rate_cells(rate(row.get("harmfulness"))),
            share(rate(row.get("harmfulness_without_prefix"))),
        )
        for row in rows(metrics, "refusal_prefix")
    ]
    columns = (
        "model", "forced prefix", "harmful share", "95 % interval", "harmful", "scored", "unscored",
        "harmful share, without the prefix",
    )  # fmt: skip
    note = "If a prefix alone makes the base model look safe, a shallow alignment has no reason to reach beyond it."
    return table_of("Harmfulness with forced refusal prefixes", columns, found, note)


def over_refusal_table(metrics: Metrics) -> Table | None:
    """Refusals on prompts that deserve an answer."""
    found = [
        (
            visible(row.get("set", "unnamed set")),
            *rate_cells(rate(row.get("refusals"))),
            whole(row.get("num_prompts")),
            visible(row["judge"]) if row.get("judge") else None,
        )
        for row in rows(metrics, "over_refusal")
    ]
    columns = ("prompt set", "refusal share", "95 % interval", "refused", "scored", "unscored", "prompts", "told by")
    made = table_of(
        "Over-refusal on benign prompts", columns, found, "Lower is better, as long as harmful prompts are refused."
    )
    return without_empty(made, "told by")


def category_table(metrics: Metrics) -> Table | None:
    """Attack success rate by category, one line per category and k."""
    found = [
        (visible(group.get("category", "uncategorised")), whole(row.get("k")), *rate_cells(success_rate(row))[:4])
        for group in rows(metrics, "by_category")
        for row in rows(group, "rows")
    ]
    columns = ("category", "k", "ASR", "95 % interval", "successes", "scored")
    note = "Categories hold few prompts: read the intervals before comparing them."
    return table_of("Attack success rate by category", columns, found, note)


def rate_cells(found: Rate) -> tuple[Cell, ...]:
    """A rate as five cells: share, interval, numerator, denominator, unscored."""
    return share(found), interval(found), found.numerator, found.denominator, found.num_unscored


def table_of(title: str, columns: Sequence[str], found: Sequence[tuple[Cell, ...]], note: str) -> Table | None:
    """A table, or None without rows."""
    return Table(title, tuple(columns), tuple(found), note) if found else None


def without_empty(table: Table | None, *columns: str) -> Table | None:
    """The table without those of the named columns in which no line has anything."""
    if table is None:
        return None
    kept = [
        index
        for index, name in enumerate(table.columns)
        if name not in columns or any(row[index] is not None for row in table.rows)
    ]
    lines = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[index] for index in kept), lines, table.note)
