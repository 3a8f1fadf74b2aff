"""Sections about attacks from a run's records: what an attacker's failed search counts as, and what suffixes share."""

from __future__ import annotations

from pathlib import Path

from deepalign.attacks.suffix import FILE as SUFFIXES
from deepalign.attacks.suffix import Suffix
from deepalign.records import to_jsonl
from deepalign.runs import RunFolder
from deepalign.workflows.attack_sections import attack_sections, searches_settled
from deepalign.workflows.rap import SEARCHES, SearchRecord
from deepalign.worst_case import rap_rows
from test_metrics import COMPLIED, UNSCORED, judged


def search(prompt_id: str, ended_by: str, attack: str = "rap") -> SearchRecord:
    return SearchRecord(
        prompt_id=prompt_id,
        attack=attack,
        variant="k=5",
        sample=0,
        helper="openings",
        backtracks=1,
        steps=3,
        ended_by=ended_by,  # type: ignore[arg-type]
    )


def test_a_search_that_found_no_way_was_withstood(tmp_path: Path) -> None:
    """Left out as unscored, it would raise the rate of the attack that it is a failure of."""
    records = [search("p1", "steps"), search("p2", "exhausted"), search("p3", "")]
    (tmp_path / SEARCHES).write_text(to_jsonl(records), encoding="utf-8")
    pairs = [
        judged("p1", "k=5", COMPLIED, attack="rap"),
        judged("p2", "k=5", UNSCORED, attack="rap"),
        judged("p3", "k=5", UNSCORED, attack="rap"),
        judged("p2", "k=5", UNSCORED),
    ]
    settled = searches_settled(RunFolder(tmp_path), pairs)
    assert [verdict.status for _, verdict in settled] == ["complied", "refused", "unscored", "unscored"]
    (row,) = rap_rows(settled, [5], [], {})
    assert (row["num_success"], row["num_scored"], row["num_unscored"]) == (1, 2, 1)


def test_suffixes_of_one_name_are_one_row_and_the_best_three_are_told(tmp_path: Path) -> None:
    suffixes = [
        Suffix(name="a", text="x", loss=1.0, losses=(2.0, 1.0), num_evaluated=5, num_drifted=1, steps=2),
        *(Suffix(name=name, text="x") for name in "bcd"),
        Suffix(name="own", text="y", kind="per-prompt", prompt="P", loss=1.0, num_evaluated=5, steps=3),
        Suffix(name="own", text="z", kind="per-prompt", prompt="Q", loss=3.0, num_evaluated=7, steps=4),
    ]
    (tmp_path / SUFFIXES).write_text(to_jsonl(suffixes), encoding="utf-8")
    found = {"a": "cc", "b": "cr", "c": "rr", "d": "rr", "own": "cr"}
    letters = {"c": COMPLIED, "r": "refused_at_once"}
    pairs = [
        judged(f"p{number}", name, letters[letter], attack="suffix")
        for name, outcome in found.items()
        for number, letter in enumerate(outcome)
    ]
    manifest = {"config": {"probes": ["suffix"], "suffix": None, "suffix_steps": 9}}
    section = attack_sections(RunFolder(tmp_path), manifest, pairs, [])["suffix"]
    assert [row["name"] for row in section["rows"]] == [*"abcd", "own"]
    own = section["rows"][-1]
    assert (own["loss"], own["num_evaluated"], own["steps_done"], own["stopped"]) == (2.0, 12, 4, "2 searches")
    assert own["text"] == "", "they have no text in common"
    assert (section["best_three"]["n"], section["best_three"]["mean"]) == (3, 2 / 3)
    assert (section["source"], section["steps"], section["num_runs"]) == ("search", 9, 5)
