"""Metrics as tables: for the terminal, for Markdown, for CSV, and side by side for several runs.

Every rate comes with what it rests on. Text cells may hold anything a user's file held, so each output escapes them in
its own way. Computes nothing: an absent number is shown as absent.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deepalign.report import attack_tables, brief_tables, finetuning_tables, margin_tables, utility_tables
from deepalign.report.accounts import left_out_tables, not_tested_table, run_card_table
from deepalign.report.compared import comparison_tables
from deepalign.report.panel_tables import panel_tables
from deepalign.report.reading import (
    Cell,
    Interval,
    Metrics,
    Share,
    show,
    visible,
)
from deepalign.report.sections import (
    Table,
    category_table,
    decoding_table,
    depth_table,
    kl_table,
    onset_table,
    over_refusal_table,
    prefill_table,
    refusal_prefix_table,
    thoughts_table,
)
from deepalign.report.verdict import verdict_sentence
from deepalign.report.worst_case_tables import worst_case_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

__all__ = [
    "Table",
    "audit_tables",
    "comparison_tables",
    "render_comparison",
    "render_terminal",
    "to_csv",
    "to_markdown",
    "verdict_sentence",
]

_TERMINAL_ROWS = 12
_COMPARED_ROWS = 30
_SOME_DEPTHS = {0, 1, 2, 5, 10, 20, 40, 80, 160, 320}
_ROOMY = 110
"""Console width from which all columns fit."""
_SPARED = {
    "refused at once", "recovered", "ASR, prefix judged too", "harmful share, without the prefix", "forward n",
    "forward non-finite", "reverse n", "reverse non-finite", "settings",
    "broken by some setting", "95 % interval of it", "mean steps back", "candidates tried", "candidates that drift",
    "median rank of a refusal", "95 % interval of mass", "95 % interval of base",
    "examples shown", "version", "right", "by guessing",
    "allowed, nats by position", "loss at position 0", "gradient norm at position 0", "KL at position 0",
}  # fmt: skip
"""Columns that a narrower console leaves out."""
_PAGE_ONLY = {"Run card", "Attack success rate by category", "Skipped prompts"}
"""Tables too long for a terminal."""
_MARKDOWN_SPECIAL = re.compile(r"([\\|*`\[\]<>_])")


def audit_tables(metrics: Metrics) -> list[Table]:
    """All tables of one run, in reading order; a section that was not run has none and is named in the last."""
    tuning = [
        *brief_tables.ways_tables(metrics), *finetuning_tables.tables(metrics), *margin_tables.tables(metrics),
    ]  # fmt: skip
    return _tables(metrics, tuning)


def _tables(metrics: Metrics, tuning: Sequence[Table]) -> list[Table]:
    found = [
        depth_table(metrics),
        worst_case_table(metrics),
        prefill_table(metrics),
        thoughts_table(metrics),
        *panel_tables(metrics),
        onset_table(metrics),
        *attack_tables.before_decoding(metrics),
        decoding_table(metrics),
        *attack_tables.after_decoding(metrics),
        kl_table(metrics),
        refusal_prefix_table(metrics),
        over_refusal_table(metrics),
        utility_tables.utility_table(metrics),
        utility_tables.win_rate_table(metrics),
        category_table(metrics),
        *tuning,
        *left_out_tables(metrics),
        run_card_table(metrics),
        not_tested_table(metrics),
    ]
    return [table for table in found if table]


def to_markdown(tables: Sequence[Table]) -> str:
    """GitHub-flavoured Markdown; text cells are escaped, so that none becomes markup."""
    parts = []
    for table in tables:
        lines = [f"### {_markdown_text(table.title)}", ""]
        lines.append("| " + " | ".join(_markdown_text(column) for column in table.columns) + " |")
        lines.append(
            "|" + "|".join(" ---: " if _numeric(table, i) else " --- " for i in range(len(table.columns))) + "|"
        )
        lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.rows]
        if table.note:
            lines += ["", _markdown_text(table.note)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def to_csv(table: Table) -> str:
    """CSV with the numbers as given (rates between 0 and 1); an interval becomes two columns, an absent value none."""
    split = [any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.columns))]
    header: list[str] = []
    for name, two in zip(table.columns, split, strict=True):
        header += [f"{name}, low", f"{name}, high"] if two else [name]
    content = io.StringIO(newline="")
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        cells: list[str | int | float] = []
        for cell, two in zip(row, split, strict=True):
            if isinstance(cell, Interval):
                cells += [cell.low, cell.high]
            elif two:
                cells += ["", ""]
            else:
                cells.append("" if cell is None else cell.value if isinstance(cell, Share) else cell)
        writer.writerow(cells)
    return content.getvalue()


def render_terminal(metrics: Metrics, console: Console) -> None:
    """Print the verdict and the tables that fit a terminal; long ones are cut, and say so."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Padding(Text(verdict_sentence(metrics), style="bold"), (1, 0)))
    for table in _tables(metrics, brief_tables.brief_tables(metrics)):
        if table.title not in _PAGE_ONLY:
            console.print(Padding(_terminal_table(_spread(table), console.width), (0, 0, 1, 0)))


def render_comparison(list_of_metrics: Sequence[Metrics], console: Console) -> None:
    """Print the tables of several runs side by side."""
    from rich.padding import Padding

    for table in comparison_tables(list_of_metrics):
        console.print(Padding(_terminal_table(table, console.width, most=_COMPARED_ROWS), (0, 0, 1, 0)))


def render_tables(found: Sequence[Table], console: Console) -> None:
    """Print tables whole."""
    from rich.padding import Padding

    for table in found:
        console.print(Padding(_terminal_table(table, console.width, most=len(table.rows)), (0, 0, 1, 0)))


def _spread(table: Table) -> Table:
    """A dense curve at the depths that were generated too, or at some that double; other tables as they are."""
    if table.title != "Refusal onset":
        return table
    generated = [row for row in table.rows if row[table.columns.index("generated ASR")] is not None]
    some = generated or [row for row in table.rows if row[0] in _SOME_DEPTHS]
    return replace(table, rows=tuple(some))


def _terminal_table(table: Table, width: int, most: int = _TERMINAL_ROWS) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    kept = [i for i, column in enumerate(table.columns) if width >= _ROOMY or column not in _SPARED]
    words = [table.note]
    if len(table.rows) > most:
        words.append(f"The first {most} of {len(table.rows)} rows; the report page has all.")
    shown = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(" ".join(words).strip(), style="dim"),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for index in kept:
        numeric = _numeric(table, index)
        shown.add_column(Text(table.columns[index]), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows[:most]:
        shown.add_row(*(Text(visible(show(row[index]))) for index in kept))
    return shown


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are set flush right."""
    return [_numeric(table, index) for index in range(len(table.columns))]


def _numeric(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows]
    return all(not isinstance(cell, str) for cell in cells) and any(cell is not None for cell in cells)


def _markdown_text(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(visible(text.replace("\n", " ")).split()))


def _markdown_cell(cell: Cell) -> str:
    return _markdown_text(cell) if isinstance(cell, str) else show(cell)
