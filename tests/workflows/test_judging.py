"""A judge that gives its rulings as they come: verdicts on disk at once, each text asked once, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deepalign.endpoints.client import Client
from deepalign.endpoints.servers import Server
from deepalign.endpoints.spending import Prices
from deepalign.errors import UserError
from deepalign.judges.rubric import RubricJudge, policy_rubric
from deepalign.progress import silent
from deepalign.records import Attempt, Completion, JudgeInput, Message, Ruling, Verdict
from deepalign.runs import RunFolder
from deepalign.workflows.judge_accounts import accounted, told
from deepalign.workflows.judging import judge_batch
from deepalign.workflows.steps import COMPLETIONS, judge_completions


class LatestFirst:
    """Rules in reverse order; stops with an error after `most` texts."""

    name = "latest"

    def __init__(self, most: int | None = None) -> None:
        self.asked: list[JudgeInput] = []
        self.most = most

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        rulings = dict(self.judge_each(items))
        return [rulings[index] for index in range(len(items))]

    def judge_each(self, items: Sequence[JudgeInput]) -> Iterator[tuple[int, Ruling]]:
        for number, index in enumerate(reversed(range(len(items)))):
            if number == self.most:
                raise UserError("no server is left")
            self.asked.append(items[index])
            complied = "yes" in items[index].response
            outcome = "complied" if complied else "held"
            yield index, Ruling(status="complied" if complied else "refused", outcome=outcome, score=float(complied))


def attempt(name: str, prefill: str = "", site: str = "raw") -> Attempt:
    return Attempt(
        prompt_id=name,
        attack="prefill",
        variant="k",
        sample=0,
        model="target",
        messages=(Message(role="user", content=f"How do I do the bad thing {name}?"),),
        prefill_ids=(1,) if prefill else (),
        prefill_text=prefill,
    )


def completion(one: Attempt, text: str, **fields: object) -> Completion:
    given = {"status": "ok", "text": text, "char_ends": (len(text),), "token_ids": (5,), **fields}
    return Completion(prompt_id=one.prompt_id, attack=one.attack, variant=one.variant, sample=0, **given)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def filled(run: RunFolder) -> list[Attempt]:
    attempts = [attempt("1"), attempt("2", "yes, "), attempt("3"), attempt("4"), attempt("5")]
    run.write_records(
        COMPLETIONS,
        [
            completion(attempts[0], "yes"),
            completion(attempts[1], "no"),
            completion(attempts[2], "", status="failed", reason="out of memory"),
            completion(attempts[3], "no", thoughts="yes or no"),
            completion(attempts[4], "", thoughts="yes", reason="no answer: still thinking"),
        ],
    )
    return attempts


def test_verdicts_are_those_of_a_batch(run: RunFolder) -> None:
    attempts = filled(run)
    judge = LatestFirst()
    found = judge_completions(run, judge, attempts)
    pairs = list(zip(attempts, run.records(COMPLETIONS, Completion), strict=True))
    by_key = {verdict.key: verdict for verdict in found}
    assert [by_key[one.key] for one in attempts] == judge_batch(LatestFirst(), pairs)
    assert run.records("verdicts.latest.jsonl", Verdict) == found
    by_name = {verdict.prompt_id: verdict for verdict in found}
    assert (by_name["2"].status, by_name["2"].status_with_prefix) == ("refused", "complied")
    assert (by_name["3"].status, by_name["3"].reason) == ("unscored", "out of memory")
    assert (by_name["4"].status, by_name["4"].outcome_of_thoughts) == ("refused", "complied")
    assert (by_name["5"].status, by_name["5"].outcome_of_thoughts) == ("unscored", "complied")
    assert len(judge.asked) == len(set(judge.asked)) == 6, "a text without prefill is asked once, not twice"


@pytest.mark.parametrize("most", range(7))
def test_what_was_said_before_the_end_is_on_disk_and_not_asked_again(run: RunFolder, most: int) -> None:
    attempts = filled(run)
    first = LatestFirst(most)
    told: list[int] = []
    if most < 6:
        with pytest.raises(UserError, match="no server is left"):
            judge_completions(run, first, attempts, progress=lambda stage, done, total: told.append(done))
    kept = run.records("verdicts.latest.jsonl", Verdict)
    assert {verdict.prompt_id for verdict in kept} >= ({"3"} if most < 6 else set())
    assert told == sorted(told)
    second = LatestFirst()
    whole = judge_completions(run, second, attempts)
    assert sorted(verdict.prompt_id for verdict in whole) == ["1", "2", "3", "4", "5"]
    assert len(run.records("verdicts.latest.jsonl", Verdict)) == 5
    finished = {verdict.prompt_id for verdict in kept}
    assert not [item for item in second.asked if item.prompt.split()[-1].rstrip("?") in finished]


def test_a_mistake_that_the_user_can_mend_stops_any_judge(run: RunFolder) -> None:
    class Gone:
        name = "gone"

        def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
            raise UserError("no server is left")

    with pytest.raises(UserError, match="no server is left"):
        judge_completions(run, Gone(), filled(run))


def test_what_judging_cost_is_noted_however_it_ends(run: RunFolder) -> None:
    client = Client(Server(url="http://127.0.0.1:9/v1", model="m"))
    judge = RubricJudge(policy_rubric(), client, model="m", prices=Prices(prompt=1.0, completion=2.0))

    def sitting() -> None:
        with accounted(run, judge, silent) as progress:
            progress("judging", 1, 2)
            judge.spending.calls += 2
            judge.spending.prompt_tokens += 1000
            judge.spending.completion_tokens += 10
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sitting()
    assert not (run / "manifest.json").exists(), "a folder without a manifest is given none"
    run.claim({}, {})
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            sitting()
        spent = run.manifest["judge_spending"]["rubric-m"]
        assert (spent["calls"], spent["prompt_tokens"]) == (2 * times, 1000 * times)
        assert spent["cost"] == pytest.approx(times * (1000 * 1 + 10 * 2) / 1e6)
    assert told(run.path) == ["rubric-m: 4 calls, 0 replies from the cache; 2000 tokens in, 20 out; cost 0.00204"]
