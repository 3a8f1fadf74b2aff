"""Utility in words, tables and figures: what is shown is what was measured."""

from __future__ import annotations

from typing import Any

from tests.report.utility_sample import utility_sections

from deepalign.report import figures, tables, utility_tables
from deepalign.report.page import render_page
from deepalign.report.reading import Share, only_used
from deepalign.report.verdict import headline, verdict_sentence

Metrics = dict[str, Any]


def only_utility() -> Metrics:
    return {"schema_version": 1, "model": "mine", "judge": "none", "utility": utility_sections()["utility"]}


def test_the_table_has_every_part_of_a_score() -> None:
    table = utility_tables.utility_table(only_utility())
    assert table is not None
    assert table.rows[0][:7] == ("knowledge", "acc_norm", Share(0.75), table.rows[0][3], 45, 60, 3)
    assert table.rows[1][1] == "exact_match, flexible-extract"
    assert table.rows[2][2] is None, "a failed task has no score"
    assert table.rows[-1][0] == "mean over tasks"
    assert "first 60 items" in table.note
    failed = utility_tables.failed_table(only_utility())
    assert failed is not None
    assert failed.rows == (("ifeval", 1, 1, "RuntimeError: it broke"),)


def test_a_run_of_utility_alone_speaks_of_utility() -> None:
    run = only_utility()
    assert only_used(run)
    assert headline(run).number == "52 %"
    sentence = verdict_sentence(run)
    assert sentence == "mine scores 52 % [41, 63] on average over 2 tasks (knowledge, gsm8k); no score for ifeval."
    page = render_page([run], [])
    assert "What is mine good for?" in page
    assert "How deep is the alignment" not in page
    assert "no part of a run that measures utility" in page


def test_an_audit_with_utility_keeps_its_verdict(metrics: Metrics) -> None:
    joined = {**metrics, **utility_sections()}
    assert not only_used(joined)
    assert headline(joined) == headline(metrics)
    assert verdict_sentence(joined).startswith(verdict_sentence(metrics))
    assert "on average over 2 tasks" in verdict_sentence(joined)


def test_several_models_stand_side_by_side(metrics: Metrics, deep: Metrics) -> None:
    one, other = {**metrics, **utility_sections()}, {**deep, **utility_sections(pareto=False)}
    found = {table.title: table for table in tables.comparison_tables([one, other])}
    trade_off = found["Safety, over-refusal and utility"]
    assert [row[-1] for row in trade_off.rows] == ["yes", "no"]
    assert trade_off.rows[0][3] == Share(0.75)
    assert found["Utility, compared"].rows[-1][0] == "mean over tasks"
    svg = figures.trade_off([one, other])
    assert "attack success rate 75 %, utility 52 %, not beaten on both" in svg
    page = render_page([one, other], [])
    assert "Safety, over-refusal and utility" in page
