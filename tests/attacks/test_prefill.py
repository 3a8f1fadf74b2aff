"""Prefilling: exactly the first k ids of the answer, and a name for what could not be tried."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deepalign.attacks import AttackSettings, attempts, row_seed
from deepalign.attacks.prefill import Skipped, prefill_plan, variant
from deepalign.records import Key, Prompt, Sampling

WARM = Sampling(temperature=0.7, max_new_tokens=9)


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(letter) for letter in text)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in ids)


def settings(**changes: object) -> AttackSettings:
    values = {"encode": encode, "decode": decode, "system_prompt": None, "sampling": WARM, "samples": 1, "seed": 7}
    return AttackSettings(**{**values, **changes})  # type: ignore[arg-type]


LONG = Prompt(prompt_id="long", text="Do it", category="fraud", answer="Sure, here")
SHORT = Prompt(prompt_id="short", text="Do that", answer="Yes")
NONE = Prompt(prompt_id="none", text="Do this")
EMPTY = Prompt(prompt_id="empty", text="Do so", answer="")


def test_the_first_k_ids_of_the_answer_are_forced() -> None:
    plan = prefill_plan([LONG], [0, 1, 5, 10], settings())
    assert plan.skipped == ()
    assert [(attempt.variant, attempt.prefill_text) for attempt in plan.attempts] == [
        ("k=0", ""),
        ("k=1", "S"),
        ("k=5", "Sure,"),
        ("k=10", "Sure, here"),
    ]
    for attempt, k in zip(plan.attempts, (0, 1, 5, 10), strict=True):
        assert attempt.prefill_ids == encode("Sure, here")[:k]
        assert (attempt.prompt_id, attempt.attack, attempt.model) == ("long", "prefill", "target")
        assert (attempt.category, attempt.sampling, attempt.sample) == ("fraud", WARM, 0)
        assert [(turn.role, turn.content) for turn in attempt.messages] == [("user", "Do it")]


def test_a_short_or_missing_answer_is_skipped_by_name_and_never_padded() -> None:
    plan = prefill_plan([LONG, SHORT, NONE, EMPTY], [0, 3, 4], settings())
    made = [(attempt.prompt_id, attempt.variant) for attempt in plan.attempts]
    assert made == [
        *[("long", variant(k)) for k in (0, 3, 4)],
        *[("short", variant(k)) for k in (0, 3)],
        ("none", "k=0"),
        ("empty", "k=0"),
    ]
    assert plan.skipped == (
        Skipped(prompt_id="short", k=4, answer_tokens=3, reason="the answer has only 3 tokens"),
        Skipped(prompt_id="none", k=3, answer_tokens=0, reason="no reference answer"),
        Skipped(prompt_id="none", k=4, answer_tokens=0, reason="no reference answer"),
        Skipped(prompt_id="empty", k=3, answer_tokens=0, reason="no reference answer"),
        Skipped(prompt_id="empty", k=4, answer_tokens=0, reason="no reference answer"),
    )


def test_depths_come_out_in_order() -> None:
    plan = prefill_plan([LONG, SHORT], [5, 0, 3], settings())
    assert [attempt.variant for attempt in plan.attempts] == ["k=0", "k=3", "k=5", "k=0", "k=3"]


def test_nothing_in_nothing_out() -> None:
    for prompts, depths in (([], [0, 5]), ([LONG], [])):
        plan = prefill_plan(prompts, depths, settings())
        assert plan.attempts == plan.skipped == ()


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_system_prompt_comes_first(system: str) -> None:
    (attempt,) = prefill_plan([LONG], [0], settings(system_prompt=system)).attempts
    assert [(turn.role, turn.content) for turn in attempt.messages] == [("system", system), ("user", "Do it")]


def test_every_attempt_has_a_key_and_a_seed_of_its_own() -> None:
    plan = prefill_plan([LONG, SHORT], [0, 1, 3], settings(samples=4))
    assert len(plan.attempts) == 2 * 3 * 4
    assert len({attempt.key for attempt in plan.attempts}) == 24
    assert len({attempt.seed for attempt in plan.attempts}) == 24
    assert [attempt.sample for attempt in plan.attempts[:4]] == [0, 1, 2, 3]


def test_a_seed_depends_on_the_runs_seed_and_the_key_alone() -> None:
    many = {
        attempt.key: attempt.seed for attempt in prefill_plan([LONG, SHORT], [0, 1, 3], settings(samples=4)).attempts
    }
    few = {attempt.key: attempt.seed for attempt in prefill_plan([SHORT], [3], settings(samples=2)).attempts}
    other = {attempt.key: attempt.seed for attempt in prefill_plan([SHORT], [3], settings(samples=2, seed=8)).attempts}
    assert all(many[key] == seed for key, seed in few.items())
    assert all(few[key] != seed for key, seed in other.items())
    assert all(0 <= seed < 2**64 for seed in many.values())


def test_seeds_do_not_change_between_versions() -> None:
    """The first 16 digits of `printf '0\\x1fp1\\x1fprefill\\x1fk=5\\x1f0\\x1ftarget' | sha256sum`.

    A changed seed would make a resumed run two runs.
    """
    key = Key(prompt_id="p1", attack="prefill", variant="k=5", sample=0)
    assert row_seed(0, key, "target") == 0xB7A8FF04CB805009
    assert row_seed(0, key, "base") != row_seed(0, key, "target")


def test_fields_of_a_key_do_not_run_together() -> None:
    one = Key(prompt_id="p", attack="a1", variant="", sample=0)
    other = Key(prompt_id="p", attack="a", variant="1", sample=0)
    assert row_seed(0, one, "target") != row_seed(0, other, "target")


def test_attempts_decode_nothing_where_nothing_is_forced() -> None:
    def refuse(ids: Sequence[int]) -> str:
        raise AssertionError("nothing to decode")

    (attempt,) = attempts(LONG, settings(decode=refuse), attack="none", variant="")
    assert attempt.prefill_text == ""
