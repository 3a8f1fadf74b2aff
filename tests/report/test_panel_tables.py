"""The tables of a panel: what stands first, and what is said where a number does not exist."""

from __future__ import annotations

from typing import Any

import pytest

from deepalign.agreement import cohen_kappa, fleiss_kappa
from deepalign.report.page import render_page
from deepalign.report.panel_tables import agreement_table, disagreements_table, overall_table, panel_tables, rates_table
from deepalign.statistics import Rate

RATE = {"numerator": 1, "denominator": 2, "num_unscored": 3, "rate": 0.5, "ci95": [0.1, 0.9]}
NONE = {"numerator": 0, "denominator": 0, "num_unscored": 5, "rate": None, "ci95": None}
JUDGES = ("<b>one</b>", "two", "majority")


@pytest.fixture
def panel() -> dict[str, Any]:
    settings = [("decoding", "greedy"), ("prefill", "k=10"), ("prefill", "k=5"), ("prefill", "k=0")]
    said = {"<b>one</b>": "refused", "two": "complied"}
    return {
        "judges": list(JUDGES[:2]),
        "overall": [{"judge": name, "asr": NONE if name == "two" else RATE} for name in JUDGES],
        "rates": [
            {"judge": name, "attack": attack, "variant": variant, "asr": RATE}
            for name in JUDGES
            for attack, variant in settings
        ],
        "pairs": [{"judges": list(JUDGES[:2]), **cohen_kappa([("refused", "refused")] * 4)}],
        "fleiss": fleiss_kappa([]),
        "num_completions": 9,
        "num_disagreements": 1,
        "disagreements": [{"prompt_id": "p1", "attack": "prefill", "variant": "k=5", "sample": 0, "verdicts": said}],
    }


def test_depths_stand_first_and_in_order(panel: dict[str, Any]) -> None:
    table = rates_table({"panel": panel})
    assert table is not None
    assert [row[:3] for row in table.rows[:4]] == [
        ("prefill", "k=0", "<b>one</b>"), ("prefill", "k=0", "two"), ("prefill", "k=0", "majority"),
        ("prefill", "k=5", "<b>one</b>"),
    ]  # fmt: skip
    assert [row[1] for row in table.rows[::3]] == ["k=0", "k=5", "k=10", "greedy"]


def test_nothing_scored_and_no_kappa_are_told(panel: dict[str, Any]) -> None:
    rates, agreement = overall_table({"panel": panel}), agreement_table({"panel": panel})
    assert rates is not None
    assert agreement is not None
    assert rates.rows[1] == ("two", None, None, 0, 0, 5)
    assert [row[2] for row in agreement.rows] == ["undefined", "undefined"]
    assert "every verdict is the same" in str(agreement.rows[0])
    assert "nothing was scored by all" in str(agreement.rows[1])


def test_completions_are_redacted_unless_they_are_there(panel: dict[str, Any]) -> None:
    table = disagreements_table({"panel": panel})
    assert table is not None
    assert table.rows == (("p1", "prefill", "k=5", 0, "refused", "complied"),)
    assert "redacted" in table.note
    panel["disagreements"][0]["completion"] = "<i>an answer</i>"
    shown = disagreements_table({"panel": panel})
    assert shown is not None
    assert shown.rows[0][-1] == "<i>an answer</i>"
    assert "redacted" not in shown.note
    page = render_page([{"model": "m", "judge": "majority", "panel": panel}], [], redact=False)
    assert "&lt;i&gt;an answer" in page
    assert "<i>an answer" not in page
    assert "<b>one</b>" not in page


def test_one_judge_makes_no_panel() -> None:
    assert panel_tables({"panel": None}) == []
    assert Rate  # the rates above have its fields
    assert set(RATE) == set(Rate.__dataclass_fields__)
