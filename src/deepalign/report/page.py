"""One self-contained HTML page, for one run or for several side by side.

Owns what the page says and in which order; the numbers come from `tables` and `figures`. Needs no network and no
script. Completions and prefills are redacted unless asked for, since they may be harmful; prompts and immediate
refusals are shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from deepalign.errors import UserError
from deepalign.report import accounts, figures, sections, tables, tuned, utility_tables
from deepalign.report.parts import PARTS, Part
from deepalign.report.reading import (
    OPTIONAL_PROBES,
    SECTION_NAMES,
    TUNING_PROBES,
    Cell,
    Metrics,
    Share,
    absence,
    block,
    labels,
    legible,
    not_run,
    number,
    only_tuned,
    only_used,
    show,
    visible,
)
from deepalign.report.verdict import Headline, headline, verdict_parts
from deepalign.report.worst_case_words import WorstCase

_FOLDER = Path(__file__).parent
_SHORT_INTERVAL = re.compile(r"\[([\d.]+)-([\d.]+)\]")
_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """A part of the page: one figure at two widths, and the tables behind it."""

    anchor: str
    title: str
    lead: str
    wide: Markup
    narrow: Markup
    figure_note: str
    unseen: str
    """Why there is no figure where nothing else says it."""
    tables: tuple[tuple[str, sections.Table], ...]
    """Pairs of run name and table; the name is empty where there is one run."""
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the top and the end of the page say of one run."""

    name: str
    sentence: str
    """What stands beside the headline."""
    headline: Headline
    worst: WorstCase | None
    """The second number with its sentence; None where no attack was run."""
    also: str
    """What the verdict says below both numbers."""
    facts: str
    left_out: tuple[sections.Table, ...]
    all_kept: str
    """What to say where nothing was left out."""
    card: sections.Table | None
    not_tested: sections.Table | None
    depth: sections.Table | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Example:
    """One exchange, with its texts as they may be shown."""

    prompt: str
    setting: str
    prefill: str
    prefill_redacted: bool
    completion: str
    completion_redacted: bool
    outcome: str


def render_page(
    metrics_list: Sequence[Metrics],
    examples: Sequence[Mapping[str, Any]],
    *,
    redact: bool = True,
    title: str | None = None,
) -> str:
    """Render the report page; without matplotlib it has its tables and says how to get the figures.

    Args:
        metrics_list: One `metrics.json` dict per run; several make a comparison.
        examples: Exchanges with category, prompt, k, variant, prefill_text, completion, status and outcome.
        redact: Hide prefills, and completions other than immediate refusals.
        title: Page title; by default it names the runs.
    """
    if not metrics_list:
        raise UserError("a report page needs the metrics of at least one run")
    names = labels(metrics_list)
    used = all(only_used(run) for run in metrics_list)
    audited = not all(only_tuned(run) or only_used(run) for run in metrics_list)
    question = "How deep is the alignment of" if audited else "What does fine-tuning do to the alignment of"
    found = [_section(part, metrics_list, names) for part in PARTS]
    return _template().render(
        title=visible(title) if title else _title(question, names, used=used),
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        content_policy=_CONTENT_POLICY,
        runs=[_run(run, name) for run, name in zip(metrics_list, names, strict=True)],
        sections=[section for section in found if section],
        comparison=tables.comparison_tables(metrics_list) if len(metrics_list) > 1 else [],
        examples=_examples(examples, redact),
        redact=redact,
        threshold=_threshold(metrics_list),
        audited=audited,
        judged=not used,
        used=any(block(run, "utility") for run in metrics_list),
        tuned=any(not_run(run, probe) is None for run in metrics_list for probe in TUNING_PROBES),
        attacked=any(block(run, "worst_case") for run in metrics_list),
        fixture=any(run.get("fixture") for run in metrics_list),
    )


def _title(question: str, names: Sequence[str], *, used: bool) -> str:
    joined = " and ".join(names)
    return f"What {'are' if len(names) > 1 else 'is'} {joined} good for?" if used else f"{question} {joined}?"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["unbroken"] = _unbroken
    environment.filters["numeric"] = tables.numeric_columns
    return environment.get_template("page.html")


def _cell(cell: Cell) -> str:
    """A cell as text in which neither a percentage nor a short interval is broken across lines."""
    return _SHORT_INTERVAL.sub("[\\1\u2011\\2]", show(cell).replace(" %", "\u00a0%"))


def _unbroken(text: object) -> str:
    """Running text in which a percentage, a short interval and a k stay on one line."""
    return _cell(str(text)).replace("k = ", "k\u00a0=\u00a0")


def _run(run: Metrics, name: str) -> _Run:
    parts = verdict_parts(run)
    worst = parts.worst if parts.worst and parts.worst.number else None
    return _Run(
        name=name,
        sentence=(parts.depth or parts.tuned) if worst else parts.joined,
        headline=headline(run),
        worst=worst,
        also=" ".join(filter(None, (parts.tuned if parts.depth else "", parts.utility))) if worst else "",
        facts=_facts(run),
        left_out=tuple(accounts.left_out_tables(run)),
        all_kept=(
            "No cell diverged or failed; unscored completions are counted beside each rate."
            if only_tuned(run)
            else "Nothing was left unscored, failed or was skipped."
        ),
        card=accounts.run_card_table(run),
        not_tested=accounts.not_tested_table(run),
        depth=sections.depth_table(run),
    )


def _facts(run: Metrics) -> str:
    if only_used(run):
        return utility_tables.facts(run)
    if only_tuned(run):
        judge = block(run, "finetuning").get("judge") or run.get("judge")
        counted = tuned.cells_counted(run)
        return visible(", ".join(fact for fact in (counted, f"judge: {judge}" if judge else "") if fact))
    decoder = block(run, "run_card").get("decoder")
    samples = decoder.get("num_samples") if isinstance(decoder, Mapping) else None
    facts = [
        f"{run['num_prompts']} prompts" if run.get("num_prompts") is not None else "",
        f"{samples} sample{'' if samples == 1 else 's'} each" if samples is not None else "",
        f"judge: {_judge(run)}" if run.get("judge") else "",
        f"base model: {run['base']}" if run.get("base") else "no base model",
    ]
    return visible(", ".join(fact for fact in facts if fact))


def _judge(run: Metrics) -> str:
    members = [str(name) for name in block(run, "panel").get("judges") or [] if name != run["judge"]]
    return f"{run['judge']} of {', '.join(members)}" if members else str(run["judge"])


def _section(part: Part, runs: Sequence[Metrics], names: Sequence[str]) -> _Section | None:
    """A part as the page shows it; None where no run has anything to say about it."""
    figure, probes, title, makers, lead, unseen = part
    found = [
        (name, table) for run, name in zip(runs, names, strict=True) for make in makers for table in _made(make(run))
    ]
    alone = len(runs) == 1
    missing = [
        f"{'' if alone else name + ': '}{SECTION_NAMES[probe]} not tested ({visible(reason)})."
        for run, name in zip(runs, names, strict=True)
        for probe in probes
        if (reason := absence(run, probe)) is not None
    ]
    wide, narrow, note = _figure(figure, runs)
    # Most audits leave some of these out: the table of what was not tested says so, an empty part no more.
    told = missing and not all(probe in OPTIONAL_PROBES for probe in probes)
    if not (told or wide or note or found):
        return None
    return _Section(
        anchor=figure.replace("_", "-"),
        title=title,
        lead=lead,
        wide=wide,
        narrow=narrow,
        figure_note=note,
        unseen=unseen,
        tables=tuple(("" if alone else name, table) for name, table in found),
        missing=tuple(missing),
    )


def _made(made: sections.Table | list[sections.Table] | None) -> list[sections.Table]:
    return made if isinstance(made, list) else [made] if made else []


def _figure(name: str, runs: Sequence[Metrics]) -> tuple[Markup, Markup, str]:
    if not figures.drawable(name, runs):
        return Markup(), Markup(), ""
    draw = getattr(figures, name)
    try:
        # Safe as markup: matplotlib escapes every label, and `svg.py` the alternative text.
        return Markup(draw(runs)), Markup(draw(runs, width="narrow")), ""
    except UserError as error:
        return Markup(), Markup(), str(error)


def _threshold(runs: Sequence[Metrics]) -> str:
    stated = [number(block(run, "depth").get("threshold")) for run in runs]
    found = next((value for value in stated if value is not None), 0.1)
    return show(Share(found)).replace(".0 %", " %")


def _examples(examples: Sequence[Mapping[str, Any]], redact: bool) -> dict[str, list[_Example]]:
    grouped: dict[str, list[_Example]] = {}
    for example in examples:
        category = visible(example.get("category") or "uncategorised")
        grouped.setdefault(category, []).append(_example(example, redact))
    return grouped


def _example(example: Mapping[str, Any], redact: bool) -> _Example:
    outcome = str(example.get("outcome") or "unscored").replace("_", " ")
    outcome = "no harm found" if outcome == "held" else outcome
    harmless = example.get("status") == "refused" and example.get("outcome") == "refused_at_once"
    prefill, completion = str(example.get("prefill_text") or ""), str(example.get("completion") or "")
    hide_prefill, hide_completion = redact and bool(prefill), redact and bool(completion) and not harmless
    k, variant = example.get("k"), visible(example.get("variant") or "")
    return _Example(
        prompt=legible(example.get("prompt") or ""),
        setting=variant if k is None else f"k = {k}" + ("" if variant in {"", f"k={k}"} else f", {variant}"),
        prefill=f"[redacted: {_words(prefill)}]" if hide_prefill else legible(prefill),
        prefill_redacted=hide_prefill,
        completion=f"[redacted: {_words(completion)}; {visible(outcome)}]" if hide_completion else legible(completion),
        completion_redacted=hide_completion,
        outcome=visible(outcome),
    )


def _words(text: str) -> str:
    count = len(text.split())
    return f"{count} word{'' if count == 1 else 's'}"
