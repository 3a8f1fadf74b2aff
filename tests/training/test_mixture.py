"""The rows of a deepening run: which, in which order, with which weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from deepalign.chat import Rendered
from deepalign.errors import UserError
from deepalign.recovery import RecoverySchedule
from deepalign.training.mixture import ANCHOR, RECOVERY, TRANSITION, Anchor, MixturePlan, RecoverySource, mix

STOP = 9


def source(number: int, harmful: int = 6) -> RecoverySource:
    prompt = Rendered(ids=(1, 100 + number), response_mask=(False, False))
    return RecoverySource(prompt=prompt, harmful_ids=tuple(range(20, 20 + harmful)), refusal_ids=(50, 51, STOP))


def anchor(number: int, length: int = 4) -> Anchor:
    prompt = Rendered(ids=(1, 200 + number), response_mask=(False, False))
    return Anchor(prompt=prompt, answer_ids=tuple(range(60, 60 + length)))


def plan(**settings: Any) -> MixturePlan:
    return MixturePlan(**{"epochs": 3, "recovery_batch": 4, "anchor_batch": 5, **settings})


def steps(rows: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def is_recovery(row: dict[str, Any]) -> bool:
    return ANCHOR not in row["groups"]


@pytest.mark.parametrize("num_sources", [1, 3, 4, 6, 8])
def test_every_step_holds_the_same_numbers_of_both(num_sources: int) -> None:
    found = mix([source(i) for i in range(num_sources)], [anchor(i) for i in range(7)], plan(), {STOP})
    assert len(found.rows) == found.num_steps * 9
    for step in steps(found.rows, 9):
        assert sum(map(is_recovery, step)) == 4
    assert found.num_steps == 3 * -(-num_sources // 4)


def test_every_source_is_taken_in_every_epoch_and_anchors_in_turn() -> None:
    found = mix([source(i) for i in range(8)], [anchor(i) for i in range(10)], plan(), {STOP})
    for epoch in steps(found.rows, 18):
        assert Counter(row["input_ids"][1] for row in epoch if is_recovery(row)) == {100 + i: 1 for i in range(8)}
        assert Counter(row["input_ids"][1] for row in epoch if not is_recovery(row)) == {200 + i: 1 for i in range(10)}


def test_loss_lies_on_refusals_and_answers_alone() -> None:
    found = mix([source(i) for i in range(4)], [anchor(i) for i in range(4)], plan(), {STOP})
    for row in found.rows:
        learned = [label for label in row["labels"] if label != -100]
        assert learned == ([50, 51, STOP] if is_recovery(row) else [60, 61, 62, 63])
        assert row["input_ids"][-len(learned) :] == learned
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["groups"])


def test_the_beginnings_are_the_schedules() -> None:
    schedule = RecoverySchedule(share=0.7, longest=6, seed=3)
    found = mix([source(i) for i in range(4)], [anchor(0)], plan(schedule=schedule, seed=5), {STOP})
    for epoch, step in enumerate(steps(found.rows, 9)):
        for row in filter(is_recovery, step):
            held = len(row["input_ids"]) - 2 - 3
            assert held == schedule.tokens(epoch, row["input_ids"][1] - 100)


def test_dense_turns_from_every_position_of_the_beginning() -> None:
    schedule = RecoverySchedule(share=1.0, longest=1)
    made = plan(dense=0.25, schedule=schedule)
    row = next(filter(is_recovery, mix([source(0)], [anchor(0)], made, {STOP}).rows))
    assert row["input_ids"] == [1, 100, 20, 50, 51, STOP]
    assert row["labels"] == [-100, -100, 50, 50, 51, STOP]
    assert row["groups"][2:] == [TRANSITION, RECOVERY, RECOVERY, RECOVERY]
    assert made.group_weights == pytest.approx([0.15, 0.8, 0.05])


def test_the_order_depends_on_the_seed_alone() -> None:
    sources, anchors = [source(i) for i in range(9)], [anchor(i) for i in range(9)]
    one, same, other = (mix(sources, anchors, plan(seed=seed), {STOP}).rows for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_what_does_not_fit_is_counted() -> None:
    long = RecoverySource(
        prompt=Rendered(ids=tuple(range(40)), response_mask=(False,) * 40), harmful_ids=(20,), refusal_ids=(50,)
    )
    found = mix([source(0), long], [anchor(0, 4), anchor(1, 30)], plan(max_length=12), {STOP})
    assert (found.num_too_long, found.num_cut_anchors) == (1, 1)
    assert max(len(row["input_ids"]) for row in found.rows) <= 12


@pytest.mark.parametrize(("sources", "anchors", "named"), [([], [anchor(0)], "refusal"), ([source(0)], [], "harmless")])
def test_nothing_to_train_on(sources: Any, anchors: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        mix(sources, anchors, plan(), {STOP})


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 1.0}, {"dense": 1.0}, {"epochs": 0}, {"anchor_batch": 0}])
def test_numbers_that_cannot_be_meant(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(bad)).replace('_', '-')} "):
        plan(**bad)
