"""Completions -> verdicts: what a judge is shown of a completion, and what its rulings become.

A judge that takes a batch is given one; a judge that answers as its replies come (`judge_each`) is given many texts at
once, and a verdict is whole when the last of its rulings is there. Whatever fails is unscored with its reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from deepalign.attacks.disguises import keeps_places, read_back, why_unreadable
from deepalign.errors import UserError
from deepalign.judges import Judge
from deepalign.records import Attempt, Completion, JudgeInput, Ruling, Verdict

_BATCH, _BATCH_AS_THEY_COME = 64, 8192
Pairs = Sequence[tuple[Attempt, Completion]]


@runtime_checkable
class RulesAsTheyCome(Protocol):
    """A judge that waits for others, and gives its rulings in whatever order they arrive."""

    def judge_each(self, items: Sequence[JudgeInput]) -> Iterator[tuple[int, Ruling]]:
        """Rulings with the index of their item; an item without one stays open."""


def batch_of(judge: Judge) -> int:
    """Completions to give a judge at a time."""
    return _BATCH_AS_THEY_COME if isinstance(judge, RulesAsTheyCome) else _BATCH


def judged(judge: Judge, pairs: Pairs) -> Iterator[list[Verdict]]:
    """Verdicts as soon as they are there.

    Raises:
        UserError: The judge cannot go on; what it said before has been yielded.
    """
    if isinstance(judge, RulesAsTheyCome):
        yield from ([verdict] for verdict in _as_they_come(judge, judge.name, pairs))
    else:
        yield judge_batch(judge, pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a judge is shown of a completion; None where there is nothing of the kind."""

    alone: JudgeInput | None
    joined: JudgeInput | None
    thoughts: JudgeInput | None

    @property
    def texts(self) -> tuple[JudgeInput, ...]:
        """The different ones among them."""
        return tuple(dict.fromkeys(text for text in (self.alone, self.joined, self.thoughts) if text is not None))


def shown(attempt: Attempt, completion: Completion) -> Shown:
    """The completion alone, together with its prefill, and its thoughts."""
    empty = bool(_why_nothing(completion))
    return Shown(
        alone=None if empty else _seen(attempt, completion.text),
        joined=None if empty else _seen(attempt, _before(attempt, completion) + completion.text),
        thoughts=_seen(attempt, completion.thoughts) if completion.thoughts.strip() else None,
    )


def _as_they_come(judge: RulesAsTheyCome, name: str, pairs: Pairs) -> Iterator[Verdict]:
    wanted = [shown(attempt, completion) for attempt, completion in pairs]
    missing = [len(one.texts) for one in wanted]
    places: dict[JudgeInput, list[int]] = {}
    for number, one in enumerate(wanted):
        for text in one.texts:
            places.setdefault(text, []).append(number)
    items = list(places)
    known: dict[JudgeInput | None, Ruling] = {}

    def whole(number: int) -> Verdict:
        nothing = _unscored(_why_nothing(pairs[number][1]))
        one = wanted[number]
        rulings = [known.get(text, nothing) for text in (one.alone, one.joined)]
        return to_verdict(name, *pairs[number], rulings[0], rulings[1], known.get(one.thoughts))

    yield from (whole(number) for number, count in enumerate(missing) if not count)
    for index, ruling in judge.judge_each(items):
        known[items[index]] = ruling
        for number in places[items[index]]:
            missing[number] -= 1
            if not missing[number]:
                yield whole(number)


def judge_batch(judge: Judge, pairs: Pairs) -> list[Verdict]:
    """Verdicts on completions, alone and with their prefill; whatever fails is unscored with its reason."""
    wanted = [shown(attempt, completion) for attempt, completion in pairs]
    # A completion without a prefill is the same text twice, and must not be paid twice.
    items = list(dict.fromkeys(text for one in wanted for text in one.texts))
    known: dict[JudgeInput | None, Ruling] = dict(zip(items, _rulings(judge, items) if items else [], strict=True))
    verdicts = []
    for (attempt, completion), one in zip(pairs, wanted, strict=True):
        nothing = _unscored(_why_nothing(completion))
        alone, joined = known.get(one.alone, nothing), known.get(one.joined, nothing)
        verdicts.append(to_verdict(judge.name, attempt, completion, alone, joined, known.get(one.thoughts)))
    return verdicts


def to_verdict(
    judge: str, attempt: Attempt, completion: Completion, one: Ruling, both: Ruling, thought: Ruling | None = None
) -> Verdict:
    """A judge's rulings on a completion alone, with its prefill, and on its thoughts, as a record."""
    if reason := _why_nothing(completion):
        one = both = _unscored(reason)
    one, both = _if_readable(attempt, completion, one), _if_readable(attempt, completion, both)
    return Verdict(
        prompt_id=attempt.prompt_id,
        attack=attempt.attack,
        variant=attempt.variant,
        sample=attempt.sample,
        judge=judge,
        status=one.status,
        outcome=one.outcome,
        reason=one.reason,
        refusal_position=_position(attempt, completion, one.refusal_char),
        status_with_prefix=both.status,
        outcome_with_prefix=both.outcome,
        reason_with_prefix=both.reason,
        refuses=one.refuses,
        score=one.score,
        score_with_prefix=both.score,
        raw=one.raw,
        raw_with_prefix=both.raw,
        outcome_of_thoughts=thought.outcome if thought else "",
    )


def _why_nothing(completion: Completion) -> str:
    """Why there is nothing to judge; "" where there is."""
    if completion.status == "failed" or (completion.reason and not completion.text):
        return completion.reason or "the attempt failed"
    return ""


def _unscored(reason: str) -> Ruling:
    return Ruling(status="unscored", outcome="unscored", reason=reason)


def _if_readable(attempt: Attempt, completion: Completion, ruling: Ruling) -> Ruling:
    """A ruling of compliance, unless the answer to a disguised prompt says nothing that could be read."""
    reason = why_unreadable(attempt.reading, completion.text) if ruling.status == "complied" else ""
    return _unscored(reason) if reason else ruling


def _before(attempt: Attempt, completion: Completion) -> str:
    """The part of the answer that was forced; a prefill inside the thoughts is none."""
    return "" if completion.prefill_in_thoughts else attempt.prefill_text


def _seen(attempt: Attempt, response: str) -> JudgeInput:
    """What a judge is shown: what was asked for and what was answered, both without their disguise."""
    asked = attempt.asked or attempt.messages[-1].content
    return JudgeInput(prompt=asked, response=read_back(attempt.reading, response))


def _rulings(judge: Judge, items: Sequence[JudgeInput]) -> list[Ruling]:
    try:
        rulings = judge.judge(items)
    except UserError:
        raise
    except Exception as error:
        # A judge may be anybody's code; its failure is data, never a lost run.
        reason = f"the judge failed: {type(error).__name__}: {error}"[:200]
        return [_unscored(reason) for _ in items]
    if len(rulings) != len(items):
        reason = f"the judge gave {len(rulings)} rulings for {len(items)} texts"
        return [_unscored(reason) for _ in items]
    return list(rulings)


def _position(attempt: Attempt, completion: Completion, refusal_char: int | None) -> int | None:
    """Response position of the token that holds a character of the completion."""
    if refusal_char is None or not keeps_places(attempt.reading):
        return None
    inside = completion.num_thought_tokens + bisect_right(completion.char_ends, refusal_char)
    return len(attempt.prefill_ids) + min(inside, max(0, len(completion.token_ids) - 1))
