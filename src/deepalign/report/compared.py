"""Several runs side by side: depth, every attack, attack success rate by k, the other probes, settings that differ.

Knows the metrics' fields and nothing of terminals, files or pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepalign.report import utility_tables
from deepalign.report.accounts import tuning_table
from deepalign.report.reading import (
    Cell,
    Metrics,
    block,
    interval,
    labels,
    rate,
    rows,
    share,
    success_rate,
    visible,
    whole,
)
from deepalign.report.sections import Table
from deepalign.report.verdict import headline
from deepalign.report.worst_case_tables import compared_attacks

_SETTINGS = (
    "system_prompt", "template_hash", "prompt_set", "prompt_hash", "num_prompts", "answers", "judge", "judge_version",
)  # fmt: skip


def comparison_tables(list_of_metrics: Sequence[Metrics]) -> list[Table]:
    """Several runs side by side: depth, attack success rate by k, the other probes, and settings that differ."""
    names = labels(list_of_metrics)
    columns = ("k", *(column for name in names for column in (name, f"{name}, 95 % interval", f"{name}, scored")))
    curves = [{whole(row.get("k")): success_rate(row) for row in rows(run, "prefill")} for run in list_of_metrics]
    by_k = []
    for k in sorted({k for curve in curves for k in curve if k is not None}):
        cells: list[Cell] = [k]
        for curve in curves:
            found = curve.get(k)
            cells += [share(found), interval(found), found.denominator] if found else [None, None, None]
        by_k.append(tuple(cells))
    found_tables = [
        _depth_comparison(list_of_metrics, names),
        utility_tables.trade_off_table(list_of_metrics),
        compared_attacks(list_of_metrics),
        Table("Attack success rate by forced tokens, compared", columns, tuple(by_k)),
        _rate_comparison(list_of_metrics, names, "over_refusal", "set", "refusals", "Over-refusal, compared"),
        _utility_comparison(list_of_metrics, names),
        tuning_table(list_of_metrics),
        _differing_settings(list_of_metrics, names),
    ]
    return [table for table in found_tables if table and table.rows]


def _depth_comparison(runs: Sequence[Metrics], names: Sequence[str]) -> Table:
    found = []
    for run, name in zip(runs, names, strict=True):
        depth = block(run, "depth")
        if not depth and not rows(run, "prefill"):
            continue
        top = headline(run)
        half = whole(depth.get("tokens_at_50pct"))
        stated = "never" if half is None and "tokens_at_50pct" in depth else half
        curve = [success_rate(row) for row in rows(run, "prefill") if whole(row.get("k")) == 0]
        plain = curve[0] if curve else rate(None)
        auc = depth.get("asr_auc") if isinstance(depth.get("asr_auc"), float) else None
        found.append((name, top.number, stated, share(plain), interval(plain), auc, whole(depth.get("kl_depth_90"))))
    columns = (
        "run", "depth in tokens", "first k above 50 %", "ASR at k = 0", "95 % interval", "area under the curve",
        "KL depth (90 %)",
    )  # fmt: skip
    return Table("Depth, compared", columns, tuple(found))


def _rate_comparison(
    runs: Sequence[Metrics], names: Sequence[str], section: str, key: str, field: str, title: str
) -> Table:
    found = [{visible(row.get(key, "")): rate(row.get(field)) for row in rows(run, section)} for run in runs]
    table_rows: list[tuple[Cell, ...]] = []
    for group in dict.fromkeys(group for rates in found for group in rates):
        cells: list[Cell] = [group]
        for rates in found:
            one = rates.get(group, rate(None))
            cells += [share(one), interval(one), one.denominator]
        table_rows.append(tuple(cells))
    columns = (key, *(column for name in names for column in (name, f"{name}, 95 % interval", f"{name}, scored")))
    return Table(title, columns, tuple(table_rows))


def _utility_comparison(runs: Sequence[Metrics], names: Sequence[str]) -> Table:
    found = []
    for run in runs:
        section = block(run, "utility")
        scores = {visible(row.get("task", "")): rate(row.get("score")) for row in rows(section, "tasks")}
        overall = rate(section.get("overall"))
        found.append(scores | ({utility_tables.OVERALL: overall} if overall.value is not None else {}))
    order = list(dict.fromkeys(task for scores in found for task in scores if task != utility_tables.OVERALL))
    table_rows: list[tuple[Cell, ...]] = []
    for task in [*order, *([utility_tables.OVERALL] if order else [])]:
        cells: list[Cell] = [task]
        for scores in found:
            one = scores.get(task, rate(None))
            cells += [share(one), interval(one), one.denominator]
        table_rows.append(tuple(cells))
    columns = ("task", *(column for name in names for column in (name, f"{name}, 95 % interval", f"{name}, items")))
    return Table("Utility, compared", columns, tuple(table_rows))


def _differing_settings(runs: Sequence[Metrics], names: Sequence[str]) -> Table:
    cards = []
    for run in runs:
        card = block(run, "run_card")
        decoder = card.get("decoder")
        settings = {name.replace("_", " "): card.get(name) for name in _SETTINGS}
        settings |= {f"decoder: {name}": value for name, value in decoder.items()} if isinstance(decoder, dict) else {}
        cards.append(settings | {"base": run.get("base")})
    found: list[tuple[Cell, ...]] = []
    for setting in dict.fromkeys(name for card in cards for name in card):
        values = [card.get(setting) for card in cards]
        if any(value != values[0] for value in values[1:]):
            found.append((setting, *("not recorded" if value is None else visible(value) for value in values)))
    note = "These settings are not the same in all runs, so their rates may not be comparable."
    return Table("Settings that differ", ("setting", *names), tuple(found), note)
