"""Kappa against published tables and by hand, and the section that a panel leaves in the metrics."""

from __future__ import annotations

from collections import Counter

import pytest

from deepalign.agreement import cohen_kappa, fleiss_kappa, panel_section
from deepalign.records import Attempt, Message, Status, Verdict

FLEISS_1971_STYLE = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip
"""Fourteen raters, ten subjects, five categories: the worked example of textbooks, kappa = 0.210."""


def test_cohen_of_the_worked_example() -> None:
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = cohen_kappa(pairs)
    assert found["kappa"] == pytest.approx(0.4)
    assert (found["num_agreed"], found["num_both"]) == (35, 50)


def test_cohen_at_its_ends() -> None:
    assert cohen_kappa([("y", "y"), ("n", "n")])["kappa"] == 1.0
    assert cohen_kappa([("y", "n"), ("n", "y")])["kappa"] == -1.0
    assert cohen_kappa([("y", "y"), ("y", "n")])["kappa"] == 0.0


def test_an_undefined_kappa_is_told_as_such() -> None:
    alike = cohen_kappa([("y", "y")] * 5)
    assert alike["kappa"] is None
    assert "chance" in alike["note"]
    assert alike["num_agreed"] == 5
    assert cohen_kappa([])["note"] == "nothing was scored by both"
    assert fleiss_kappa([{"y": 3}] * 4)["kappa"] is None
    assert fleiss_kappa([])["kappa"] is None


def test_fleiss_of_the_worked_example() -> None:
    votes = [{str(place): count for place, count in enumerate(row) if count} for row in FLEISS_1971_STYLE]
    assert fleiss_kappa(votes)["kappa"] == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="as many votes"):
        fleiss_kappa([{"y": 2}, {"y": 3}])


def pair(number: int, judge: str, status: Status, attack: str = "prefill") -> tuple[Attempt, Verdict]:
    key = {"prompt_id": f"p{number}", "attack": attack, "variant": "k=5", "sample": 0}
    outcome = {"refused": "held", "complied": "complied", "unscored": "unscored"}[status]
    message = Message(role="user", content="?")
    return (
        Attempt(**key, model="target", messages=(message,)),  # type: ignore[arg-type]
        Verdict(**key, judge=judge, status=status, outcome=outcome),  # type: ignore[arg-type]
    )


def test_the_section_counts_what_it_rests_on() -> None:
    said: dict[str, list[Status]] = {
        "a": ["complied", "complied", "refused", "unscored"],
        "b": ["complied", "refused", "refused", "refused"],
        "c": ["complied", "refused", "unscored", "refused"],
    }
    by_judge = {name: [pair(i, name, status) for i, status in enumerate(row)] for name, row in said.items()}
    by_judge["a"].append(pair(9, "a", "complied", attack="over_refusal"))
    by_judge["most"] = by_judge["b"]
    found = panel_section(by_judge, derived=["most"])
    rates = {row["judge"]: row["asr"] for row in found["rates"]}
    assert [(rates[name]["numerator"], rates[name]["denominator"], rates[name]["num_unscored"]) for name in "abc"] == [
        (2, 3, 1), (1, 4, 0), (1, 3, 1),
    ]  # fmt: skip
    assert {row["attack"] for row in found["rates"]} == {"prefill"}
    assert [(row["judge"], row["asr"]["numerator"], row["asr"]["denominator"]) for row in found["overall"]] == [
        ("a", 2, 3), ("b", 1, 4), ("c", 1, 3), ("most", 1, 4),
    ]  # fmt: skip
    assert [(*row["judges"], row["num_agreed"], row["num_both"]) for row in found["pairs"]] == [
        ("a", "b", 2, 3), ("a", "c", 1, 2), ("b", "c", 3, 3),
    ]  # fmt: skip
    # Scored by all: p0 (all complied) and p1 (a alone complied).
    assert found["fleiss"]["num_items"] == 2
    assert Counter(row["prompt_id"] for row in found["disagreements"]) == {"p1": 1}
    assert (found["num_disagreements"], found["num_completions"]) == (1, 4)
