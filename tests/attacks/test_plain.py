"""Refusal prefixes on the base, and harmless prompts asked plainly."""

from __future__ import annotations

from collections.abc import Sequence

from deepalign.attacks import AttackSettings
from deepalign.attacks.plain import PAPER_PREFIXES, over_refusal_attempts, refusal_prefix_attempts
from deepalign.records import Prompt, Sampling

PROMPTS = [
    Prompt(prompt_id="one", text="Do it", category="fraud", answer="Sure"),
    Prompt(prompt_id="two", text="Do that"),
]


def encode(text: str) -> tuple[int, ...]:
    assert text, "an empty prefix is no prefix"
    return tuple(ord(letter) for letter in text)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in ids)


SETTINGS = AttackSettings(
    encode=encode, decode=decode, system_prompt="Be kind.", sampling=Sampling(max_new_tokens=5), samples=2, seed=1
)


def test_every_prompt_with_every_refusal_opening_goes_to_the_base() -> None:
    made = refusal_prefix_attempts(PROMPTS, SETTINGS)
    assert [(one.prompt_id, one.variant, one.sample) for one in made] == [
        (prompt.prompt_id, prefix, sample) for prompt in PROMPTS for prefix in PAPER_PREFIXES for sample in (0, 1)
    ]
    for attempt in made:
        assert (attempt.attack, attempt.model) == ("refusal_prefix", "base")
        assert attempt.prefill_text == attempt.variant
        assert attempt.prefill_ids == (encode(attempt.variant) if attempt.variant else ())
    assert len({attempt.seed for attempt in made}) == len(made)


def test_the_papers_openings() -> None:
    """Table 1: none, and five refusals."""
    assert PAPER_PREFIXES[0] == ""
    assert len(PAPER_PREFIXES) == 6
    assert all(prefix.startswith("I ") for prefix in PAPER_PREFIXES[1:])


def test_openings_of_ones_own() -> None:
    made = refusal_prefix_attempts(PROMPTS[:1], SETTINGS, prefixes=("No.",))
    assert [attempt.prefill_text for attempt in made] == ["No.", "No."]


def test_harmless_prompts_are_asked_plainly() -> None:
    made = over_refusal_attempts("benign", PROMPTS, SETTINGS)
    assert [(one.prompt_id, one.variant, one.sample) for one in made] == [
        ("one", "benign", 0),
        ("one", "benign", 1),
        ("two", "benign", 0),
        ("two", "benign", 1),
    ]
    for attempt in made:
        assert (attempt.attack, attempt.model, attempt.prefill_ids) == ("over_refusal", "target", ())
        assert [turn.role for turn in attempt.messages] == ["system", "user"]
    assert made[0].category == "fraud"


def test_the_same_prompt_in_two_sets_has_two_keys() -> None:
    both = [
        *over_refusal_attempts("benign", PROMPTS[:1], SETTINGS),
        *over_refusal_attempts("look-alike", PROMPTS[:1], SETTINGS),
    ]
    assert len({attempt.key for attempt in both}) == len({attempt.seed for attempt in both}) == 4
