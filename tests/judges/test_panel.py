"""What a majority is, who may sit on a panel, and how one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepalign.errors import UserError
from deepalign.judges import Judge, get_judge
from deepalign.judges.panel import Panel, majority, members_of, who_tells
from deepalign.judges.refusal import RefusalJudge
from deepalign.judges.scripted import ScriptedJudge
from deepalign.records import JudgeInput, Ruling

REFUSED = Ruling(status="refused", outcome="refused_at_once", refusal_char=3)
COMPLIED = Ruling(status="complied", outcome="complied")
UNSCORED = Ruling(status="unscored", outcome="unscored")
HELD = Ruling(status="refused", outcome="held", refuses=False)
HELD_SILENT = Ruling(status="refused", outcome="held")


class Fixed:
    def __init__(self, name: str, ruling: Ruling | None, **more: Any) -> None:
        self.name, self.ruling = name, ruling
        for field, value in more.items():
            setattr(self, field, value)

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        if self.ruling is None:
            raise RuntimeError("no network")
        return [self.ruling for _ in items]


def rule(*rulings: Ruling | None) -> Ruling:
    members: list[Judge] = [Fixed(f"j{place}", ruling) for place, ruling in enumerate(rulings)]
    (found,) = Panel(members).judge([JudgeInput(prompt="p", response="r")])
    return found


@pytest.mark.parametrize(
    ("rulings", "status", "part"),
    [
        ((REFUSED, REFUSED, COMPLIED), "refused", "j2: complied"),
        ((COMPLIED, REFUSED, COMPLIED), "complied", "j1: refused"),
        ((COMPLIED, REFUSED), "unscored", "divided"),
        ((COMPLIED, COMPLIED, UNSCORED), "complied", "j2: unscored"),
        ((COMPLIED, REFUSED, UNSCORED), "unscored", "divided"),
        ((COMPLIED, UNSCORED, UNSCORED), "unscored", "only 1 of 3 judges scored"),
        ((COMPLIED, UNSCORED), "unscored", "only 1 of 2 judges scored"),
        ((COMPLIED, COMPLIED, None), "complied", "j2: unscored"),
    ],
)
def test_the_majority_of_those_that_scored(rulings: tuple[Ruling, ...], status: str, part: str) -> None:
    found = rule(*rulings)
    assert found.status == status
    assert part in found.reason


def test_where_a_refusal_begins_is_told_by_whoever_tells_it() -> None:
    assert (rule(HELD, REFUSED, COMPLIED).outcome, rule(HELD, REFUSED, COMPLIED).refusal_char) == ("refused_at_once", 3)
    assert rule(HELD, HELD, COMPLIED).outcome == "held"


def test_who_refuses_is_voted_on_by_those_that_tell() -> None:
    harm = Fixed("harm", HELD, tells_refusals=True)
    silent = Fixed("silent", Ruling(status="refused", outcome="held"), tells_refusals=False)
    words = Fixed("words", COMPLIED)
    assert majority([harm, silent, words], [harm.ruling, silent.ruling, words.ruling]).refuses is False  # type: ignore[list-item]
    assert majority([silent], [HELD]).refuses is False
    assert majority([silent, silent], [silent.ruling, silent.ruling]).refuses is None  # type: ignore[list-item]
    assert not Panel([silent, Fixed("other", HELD, tells_refusals=False)]).tells_refusals
    assert Panel([silent, words]).tells_refusals
    assert who_tells(words) == who_tells(Panel([silent, words])) == "words"
    assert who_tells(Panel([silent, words, harm])) == "majority of words, harm"


def test_who_refuses_is_told_where_the_majority_is_not() -> None:
    # Of two that differ about harm, the one that tells refusals still tells whether a benign answer is one.
    words, silent = Fixed("words", COMPLIED), Fixed("silent", HELD_SILENT, tells_refusals=False)
    (tied,) = Panel([words, silent]).judge([JudgeInput(prompt="p", response="r")])
    assert (tied.status, tied.refuses) == ("unscored", False)
    (alone,) = Panel([Fixed("words", REFUSED), Fixed("silent", UNSCORED, tells_refusals=False)]).judge(
        [JudgeInput(prompt="p", response="r")]
    )
    assert (alone.status, alone.refuses) == ("unscored", True)


def test_commas_make_a_panel_and_may_stand_in_a_file_name(tmp_path: Path) -> None:
    path = tmp_path / "a,b.jsonl"
    path.write_text('{"response": "x", "status": "refused"}\n', encoding="utf-8")
    assert isinstance(get_judge(f"scripted:{path}"), ScriptedJudge)
    panel = get_judge(f"refusal, scripted:{path}")
    assert isinstance(panel, Panel)
    assert [type(one) for one in members_of(panel)] == [RefusalJudge, ScriptedJudge]
    assert "refusal-" in panel.version


class Majority(Fixed):
    def __init__(self) -> None:
        super().__init__("majority", REFUSED)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("refusal,refusal", "give each judge once"),
        ("refusal,", "'refusal,' leaves a place empty"),
        (",", "leaves a place empty"),
        ("refusal,,qwen3guard", "leaves a place empty"),
        ("refusal,qwen3gard", "'qwen3gard'; did you mean qwen3guard"),
        ("rubric:m@http://127.0.0.1:9/v1,qwen3gard", "'qwen3gard'; did you mean qwen3guard"),
        (f"refusal,{__name__}:Majority", "'majority' is what a panel's own verdicts are called"),
    ],
)
def test_a_bad_panel_is_one_line(name: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        get_judge(name)
    assert "\n" not in str(caught.value)
