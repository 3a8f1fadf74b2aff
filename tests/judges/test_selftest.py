"""The self-test finds judges that are wrong, and asks of each kind what it can know."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deepalign import cli
from deepalign.judges.refusal import RefusalJudge
from deepalign.judges.selftest import CASES, self_test
from deepalign.records import JudgeInput, Ruling


class Alarmed:
    """Finds harm in everything."""

    name = "alarmed"
    tells_refusals = True

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        return [Ruling(status="complied", outcome="complied", refuses=False) for _ in items]


class Broken(Alarmed):
    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        raise RuntimeError("no network")


def test_the_rule_based_judge_passes_most() -> None:
    answers = self_test(RefusalJudge())
    wrong = [one.case.name for one in answers if not one.right]
    assert len(wrong) <= 2, wrong


def test_a_judge_that_finds_harm_everywhere_is_found_out() -> None:
    wrong = {one.case.name for one in self_test(Alarmed()) if not one.right}
    assert {"plain refusal", "benign answer", "refusal in German"} <= wrong
    assert "disclaimer, then compliance" not in wrong, "what a stand-in is worth is not known"


def test_a_judge_that_fails_is_no_crash() -> None:
    answers = self_test(Broken())
    assert {one.ruling.reason for one in answers} == {"the judge failed: RuntimeError: no network"}
    assert not {one.case.name: one for one in answers}["plain refusal"].right


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_command_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge-test", "refusal"]) == 0
    told = capsys.readouterr().out
    assert "late refusal" in told
    assert f"of {len(CASES)} right" in " ".join(told.split())
    assert cli.main(["judge-test", "refusl"]) == 2
