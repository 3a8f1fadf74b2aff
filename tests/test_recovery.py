"""Recovery examples: what is spliced where, what is never cut, and that the draws depend on their key alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from deepalign.chat import ChatTemplate, Rendered, answer_ids, conversation, render, stop_ids, turn_end_ids
from deepalign.recovery import RecoveryExample, RecoverySchedule, recovery_example

PROMPT = Rendered(ids=(1, 2, 3), response_mask=(False,) * 3)
HARMFUL = (10, 11, 12, 13, 14)
REFUSAL = (20, 21, 99)


def spliced(k: int, harmful: tuple[int, ...] = HARMFUL, **settings: Any) -> RecoveryExample:
    return recovery_example(PROMPT, harmful, REFUSAL, k, **{"stop_ids": {99}, **settings})


@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_the_loss_lies_on_the_refusal_alone(k: int) -> None:
    example = spliced(k)
    assert example.ids == (*PROMPT.ids, *HARMFUL[:k], *REFUSAL)
    assert [token for token, counts in zip(example.ids, example.loss_mask, strict=True) if counts] == list(REFUSAL)
    assert (example.k, example.num_cut) == (k, 0)


def test_a_harmful_answer_never_ends_its_turn() -> None:
    for harmful in ((10, 11, 99), (10, 11, 99, 12, 13), (10, 11)):
        example = spliced(4, harmful)
        assert example.ids == (1, 2, 3, 10, 11, *REFUSAL)
        assert (example.k, example.num_cut) == (2, 2)
    assert spliced(3, (99,)).ids == (*PROMPT.ids, *REFUSAL)


@pytest.mark.parametrize(("max_length", "k"), [(11, 5), (10, 4), (7, 1), (6, 0)])
def test_what_does_not_fit_is_cut_off_the_harmful_answer(max_length: int, k: int) -> None:
    example = spliced(5, max_length=max_length)
    assert len(example.ids) == max_length
    assert example.ids[-3:] == REFUSAL
    assert (example.k, example.num_cut) == (k, 5 - k)


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"3 \+ 3 tokens, more than 5"):
        spliced(0, max_length=5)
    with pytest.raises(ValueError, match="refusal is empty"):
        recovery_example(PROMPT, HARMFUL, (), 2, stop_ids=())
    with pytest.raises(ValueError, match="k is -1"):
        spliced(-1)
    with pytest.raises(ValueError, match="answer already"):
        recovery_example(Rendered(ids=(1, 2), response_mask=(False, True)), HARMFUL, REFUSAL, 1, stop_ids=())
    for settings in ({"share": 1.5}, {"longest": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            RecoverySchedule(**settings)  # type: ignore[arg-type]


def test_lengths_follow_the_papers_distribution() -> None:
    """None in half of them, the rest even over 1..C: 4,000 draws, within four standard deviations."""
    schedule = RecoverySchedule(longest=10, seed=3)
    counts = Counter(schedule.tokens(epoch, index) for epoch in range(4) for index in range(1000))
    assert set(counts) == set(range(11))
    assert abs(counts[0] - 2000) < 4 * (4000 * 0.25) ** 0.5
    assert all(abs(counts[k] - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5 for k in range(1, 11))
    always, never = RecoverySchedule(share=1.0, longest=1), RecoverySchedule(share=0.0)
    assert {always.tokens(0, index) for index in range(50)} == {1}
    assert {never.tokens(0, index) for index in range(50)} == {0}


def test_draws_depend_on_seed_epoch_and_number_alone() -> None:
    schedule = RecoverySchedule()
    forwards = [schedule.tokens(1, index) for index in range(40)]
    assert [RecoverySchedule().tokens(1, index) for index in reversed(range(40))][::-1] == forwards
    for other in (RecoverySchedule(seed=1), RecoverySchedule(seed=2**63)):
        assert [other.tokens(1, index) for index in range(40)] != forwards
    assert [schedule.tokens(2, index) for index in range(40)] != forwards
    # Neither of the numbers may stand in for another.
    assert RecoverySchedule(seed=1, share=1.0).tokens(0, 2) != RecoverySchedule(seed=2, share=1.0).tokens(1, 0)


def test_a_rendered_conversation_turns_into_a_refusal_and_ends(tiny_tokenizer: Any) -> None:
    template = ChatTemplate(text=tiny_tokenizer.chat_template, source="model")
    prompt = render(tiny_tokenizer, template, conversation("Open the door", None))
    harmful = (*answer_ids(tiny_tokenizer, "Sure, here are the steps."), *turn_end_ids(tiny_tokenizer, template))
    refusal = (*answer_ids(tiny_tokenizer, "I cannot help."), *turn_end_ids(tiny_tokenizer, template))
    example = recovery_example(prompt, harmful, refusal, 100, stop_ids=stop_ids(tiny_tokenizer))
    text = tiny_tokenizer.decode(example.ids)
    assert "assistant\nSure, here are the steps.I cannot help.<|im_end|>" in text
    assert sum(example.loss_mask) == len(refusal)
