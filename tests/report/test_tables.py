"""Tables show the numbers they are given, in every output."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from deepalign.report.reading import PROBES, Share, labels, visible
from deepalign.report.tables import (
    Table,
    audit_tables,
    comparison_tables,
    render_comparison,
    render_terminal,
    to_csv,
    to_markdown,
)

Metrics = dict[str, Any]
SECTIONS = ["models", "run_card", "unscored", "skipped", "failed", *PROBES]


def table(metrics: Metrics, title: str) -> Table:
    return next(found for found in audit_tables(metrics) if found.title.startswith(title))


def terminal(metrics: Metrics, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_terminal(metrics, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_prefill_csv_holds_the_numbers_as_given(metrics: Metrics) -> None:
    found = list(csv.reader(io.StringIO(to_csv(table(metrics, "Attack success rate by forced")))))
    for row, line in zip(metrics["prefill"], found[1:], strict=True):
        expected = [
            row["k"], row["asr"], *row["ci95"], row["num_success"], row["num_scored"], row["num_unscored"],
            row["num_skipped"], row["num_refused_at_once"], row["num_recovered"], row["asr_with_prefix"]["rate"],
        ]  # fmt: skip
        assert [float(cell) for cell in line] == pytest.approx(expected)


def test_every_probe_has_its_numbers(metrics: Metrics) -> None:
    kl = table(metrics, "KL")
    assert [row[1] for row in kl.rows] == [row["mean"] for row in metrics["kl"]]
    assert [row[5] for row in kl.rows] == [row["mean"] for row in metrics["kl_reverse"]]
    assert [row[2] for row in table(metrics, "Harmfulness").rows] == [
        Share(row["harmfulness"]["rate"]) for row in metrics["refusal_prefix"]
    ]
    assert [row[1] for row in table(metrics, "Over-refusal").rows] == [
        Share(row["refusals"]["rate"]) for row in metrics["over_refusal"]
    ]
    cells = [row["asr"] for group in metrics["by_category"] for row in group["rows"]]
    assert [row[2] for row in table(metrics, "Attack success rate by category").rows] == [Share(cell) for cell in cells]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("absence", ["missing", "null", "empty", "not_run"])
def test_sections_may_be_absent(metrics: Metrics, deep: Metrics, section: str, absence: str) -> None:
    if absence == "missing":
        metrics.pop(section)
    else:
        metrics[section] = {"null": None, "empty": [], "not_run": {"not_run": "no base model"}}[absence]
    text = to_markdown(audit_tables(metrics))
    terminal(metrics)
    comparison_tables([metrics, deep])
    if section in PROBES:
        assert PROBES[section].split(",")[0] in text.split("### Not tested")[1]
        assert ("no base model" in text) is (absence == "not_run")


def test_null_rates_are_absent_and_not_zero(metrics: Metrics) -> None:
    metrics["prefill"][3].update(asr=None, ci95=None, num_scored=0)
    metrics["over_refusal"][0]["refusals"] = {"rate": None, "numerator": 0, "denominator": 0, "ci95": None}
    markdown = to_markdown(audit_tables(metrics))
    assert "| 10 | n/a | n/a |" in markdown
    assert "| benign | n/a | n/a | 0 | 0 | n/a | 144 |" in markdown
    assert to_csv(table(metrics, "Over-refusal")).splitlines()[1] == "benign,,,,0,0,,144"


def test_nan_is_absent(metrics: Metrics) -> None:
    metrics["kl"][0]["mean"] = float("nan")
    metrics["kl"][1]["mean"] = float("inf")
    assert [row[1] for row in table(metrics, "KL").rows[:2]] == [None, None]


def test_markdown_and_terminal_escape(metrics: Metrics) -> None:
    metrics["over_refusal"][0]["set"] = "a|b\n<script>[x](javascript:1)"
    metrics["model"] = "[bold]m\x1b[31m\u202e"
    markdown = to_markdown(audit_tables(metrics))
    assert "a\\|b" in markdown
    assert "<script>" not in markdown
    assert "\\[x\\](javascript" in markdown
    shown = terminal(metrics)
    assert "[bold]m\\x1b[31m\\u202e" in shown
    assert "\x1b" not in shown


def test_terminal_shows_verdict_and_rates(metrics: Metrics) -> None:
    shown = terminal(metrics)
    assert "its alignment is 0 tokens deep" in " ".join(shown.split())
    assert f"{100 * metrics['prefill'][1]['asr']:.1f} %" in shown
    assert "first 12 of 40 rows" in shown
    assert all(len(line) <= 80 for line in terminal(metrics, 80).splitlines())


def test_comparison(metrics: Metrics, deep: Metrics) -> None:
    found = {one.title: one for one in comparison_tables([metrics, deep])}
    assert [row[1] for row in found["Depth, compared"].rows] == ["0", "\u2265 160"]
    by_k = found["Attack success rate by forced tokens, compared"]
    assert by_k.rows[1][1] == Share(metrics["prefill"][1]["asr"])
    assert by_k.rows[1][4] == Share(0.0125)
    assert found["Settings that differ"].rows == (("judge", "refusal", "guard"),)


def test_labels_are_distinct(metrics: Metrics) -> None:
    assert labels([metrics, metrics]) == ["testbed:shallow (run 1)", "testbed:shallow (run 2)"]
    assert visible("a\nb\ud800") == "a\\nb\\ud800"


def test_the_room_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, deepalign.report.page, deepalign.report.figures, deepalign.report.tables;"
        "sys.exit(bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TUNING = {"command": "deepen", "perplexity": {"set": "[b]own[/b] answers", "ratio": 1.0123, "ci95": [0.99, 1.03]}}


def test_what_was_trained_stands_beside_what_it_did(metrics: Metrics, deep: Metrics) -> None:
    found = {table.title: table for table in comparison_tables([metrics, {**deep, "tuning": TUNING}])}
    facts = dict(found["What was trained, and what was kept"].rows)
    assert facts["perplexity: ratio"] == "1.0123"
    assert facts["perplexity: ci95"] == "0.99, 1.03"
    assert "What was trained, and what was kept" not in {table.title for table in comparison_tables([metrics, deep])}


@pytest.mark.parametrize("width", [60, 120])
def test_the_terminal_shows_a_comparison_whole(metrics: Metrics, deep: Metrics, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    render_comparison([{**metrics, "model": "before"}, {**deep, "model": "after", "tuning": TUNING}], console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.0123" in shown
    assert "[b]own[/b]" in shown
    assert "rows; the report page has all" not in shown


def test_training_alone_can_be_shown() -> None:
    (found,) = comparison_tables([{"tuning": TUNING}])
    assert found.title == "What was trained, and what was kept"
