"""Probabilities of answers against a textbook softmax, on every architecture that guards come in; and the runner."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepalign.chat import ChatTemplate
from deepalign.judges.guards.formats import About
from deepalign.judges.guards.reader import Reader, Weighed, spaced
from deepalign.judges.guards.rulings import harm_ruling
from deepalign.judges.guards.runner import GuardJudge
from deepalign.judges.guards.sources import Source
from deepalign.models import LoadedModel
from deepalign.records import JudgeInput, Ruling
from support import run_out_of_memory

ARCHITECTURES = ("qwen3", "llama", "mistral", "gemma", "gemma2")
ANSWERS = {"yes": spaced("Yes", "yes"), "no": spaced("No", "no")}


@pytest.fixture
def loaded(guard_model: Callable[..., LoadedModel], guard_tokenizer: Callable[..., Any]) -> LoadedModel:
    return guard_model("llama", guard_tokenizer(words=("Yes", "No")))


def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    texts = ("Is it so?", "Sure, here are the steps. " * 7, "No", "First, open the door. Answer:")
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shares_are_a_textbook_softmax(
    architecture: str, guard_model: Callable[..., LoadedModel], guard_tokenizer: Callable[..., Any]
) -> None:
    loaded = guard_model(architecture, guard_tokenizer(words=("Yes", "No", "yes", "no")))
    vocabulary = loaded.tokenizer.get_vocab()
    rows = prompts(loaded.tokenizer)
    weighed = Reader(loaded).weigh(rows, ANSWERS)
    for ids, one in zip(rows, weighed, strict=True):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        exponentials = [float(value) for value in (logits - logits.max()).exp()]
        for answer, words in (("yes", ("Yes", "yes")), ("no", ("No", "no"))):
            meant = {vocabulary[mark + word] for word in words for mark in ("", "\u0120") if mark + word in vocabulary}
            assert len(meant) >= 2
            by_hand = sum(exponentials[entry] for entry in meant) / sum(exponentials)
            assert one.shares[answer] == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
        assert one.share("yes") == pytest.approx(one.shares["yes"] / (one.shares["yes"] + one.shares["no"]))


@pytest.mark.parametrize("max_batch", [1, 2, 32])
def test_shares_do_not_depend_on_the_batch(max_batch: int, loaded: LoadedModel) -> None:
    rows = prompts(loaded.tokenizer)
    together = Reader(loaded).weigh(rows, ANSWERS)
    for one, other in zip(together, Reader(loaded, max_batch=max_batch).weigh(rows, ANSWERS), strict=True):
        assert one.shares == pytest.approx(other.shares, rel=1e-4)
    assert [round(one.shares["yes"], 9) for one in Reader(loaded).weigh(rows[::-1], ANSWERS)] == [
        pytest.approx(one.shares["yes"], rel=1e-4) for one in together[::-1]
    ]


def test_batches_leave_room_for_logits(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(loaded.tokenizer)
    wanted = Reader(loaded).weigh(rows, ANSWERS)
    row_bytes = max(map(len, rows)) * loaded.vocab_size * 4
    for budget, most in ((1, 1), (2 * row_bytes, 3), (100 * row_bytes, 4)):
        monkeypatch.setattr("deepalign.judges.guards.reader._LOGIT_BYTES", budget)
        reader = Reader(loaded)
        sizes = [len(part) for part in reader._parts(sorted(range(4), key=lambda i: len(rows[i])), rows)]
        assert sum(sizes) == 4
        assert max(sizes) == most
        for one, other in zip(wanted, reader.weigh(rows, ANSWERS), strict=True):
            assert one.shares == pytest.approx(other.shares, rel=1e-4)


def test_too_long_and_out_of_memory_have_a_problem(loaded: LoadedModel) -> None:
    long = (5,) * (loaded.model.config.max_position_embeddings + 1)
    run_out_of_memory(loaded.model, lambda ids: ids.shape[0] > 1 or ids.shape[1] > 40)
    rows = [*prompts(loaded.tokenizer), long, (5,) * 50]
    weighed = Reader(loaded).weigh(rows, ANSWERS)
    assert [one.problem for one in weighed[4:]] == [
        "2049 input tokens exceed the judge's 2048",
        "out of memory, even alone",
    ]
    assert all(0 < one.total < 1 for one in weighed if not one.problem)
    assert sum(not one.problem for one in weighed) >= 3


def test_logits_that_are_no_numbers_have_a_problem(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.lm_head.weight[0] = float("nan")
    (one,) = Reader(loaded).weigh([(5, 6)], ANSWERS)
    assert one == Weighed(problem="non-finite logits")


def test_a_strangers_vocabulary_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="no token for '☃'"):
        Reader(loaded).weigh([(5,)], {"snow": ("☃",)})


def test_replies_that_do_not_fit_have_a_problem(loaded: LoadedModel) -> None:
    short, long = Reader(loaded).write([(5, 6), (5,) * 2040], max_new_tokens=16)
    assert short.ids
    assert not short.problem
    assert long.problem == "2040 input + 16 new tokens exceed the model's 2048"


def test_clipping_keeps_whole_texts_and_whole_characters(loaded: LoadedModel) -> None:
    reader = Reader(loaded)
    assert reader.clipped("Sure, here", 512) == "Sure, here"
    snow = "☃" * 30
    for limit in range(1, 9):
        kept = reader.clipped(snow, limit)
        assert snow.startswith(kept)
        assert len(reader.tokenizer(kept)["input_ids"]) <= limit
    assert reader.clipped("<|end|>" * 9, 3) != "", "control tokens in a text are plain text"


class Loud:
    """A guard that finds harm in any capital letter, and counts what it reads."""

    def __init__(self) -> None:
        self.about = About(
            name="loud", sizes={}, tells_refusals=False, markers=re.compile("STOP"), rule_text="capitals", clip=4
        )
        self.read: list[list[JudgeInput]] = []

    def rule(self, reader: Reader, template: ChatTemplate | None, items: Sequence[JudgeInput]) -> list[Ruling]:
        self.read.append(list(items))
        return [harm_ruling(harmful=item.response != item.response.lower(), reason="letters") for item in items]


@pytest.fixture
def judge(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> GuardJudge:
    made = GuardJudge(Loud(), Source(model=Path("none"), identity="a/b@1"))
    monkeypatch.setattr(made, "_load", lambda: (Reader(loaded), None))
    return made


def item(response: str) -> JudgeInput:
    return JudgeInput(prompt="p", response=response)


def test_equal_texts_are_read_once_and_remembered(judge: GuardJudge) -> None:
    first = judge.judge([item("ab"), item("AB"), item("ab"), item("")])
    assert [one.status for one in first] == ["refused", "complied", "refused", "unscored"]
    assert [one.outcome for one in first] == ["held", "complied", "held", "unscored"]
    assert judge.judge([item("AB"), item("cd"), item("ab")])[0] == first[1]
    assert isinstance(judge._guard, Loud)
    assert [[one.response for one in call] for call in judge._guard.read] == [["ab", "AB"], ["cd"]]


def test_memory_of_texts_is_bounded(judge: GuardJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepalign.judges.guards.runner._REMEMBERED", 2)
    many = [item(f"text {number}") for number in range(5)]
    assert len(judge.judge(many)) == 5
    assert len(judge._known) == 2
    assert [one.status for one in judge.judge(many[::-1])] == ["refused"] * 5


def test_what_was_done_to_a_text_is_said(judge: GuardJudge) -> None:
    plain, marked = judge.judge([item("ab"), item("STOP it now and then again")])
    assert plain.reason == "letters"
    assert marked.reason.startswith("letters; read the first 4 tokens of the text; broke up 1 of the judge's own")
    assert isinstance(judge._guard, Loud)
    assert judge._guard.read[0][1].response.startswith("STO P")


def test_the_version_changes_with_weights_and_rule() -> None:
    def version(identity: str, rule_text: str) -> str:
        guard = Loud()
        guard.about = dataclasses.replace(guard.about, rule_text=rule_text)
        return GuardJudge(guard, Source(model=Path("x"), identity=identity)).version

    assert len({version("a@1", "x"), version("a@2", "x"), version("a@1", "y")}) == 3
    assert version("a@1", "x").startswith("a@1#")
    assert version("a@1", "x") == version("a@1", "x")


def test_spaces_before_words() -> None:
    assert spaced("Yes") == ("Yes", "\u2581Yes", "\u0120Yes")
    assert Weighed(shares={"a": 0.2, "b": 0.6}).share("b") == pytest.approx(0.75)
