"""The built-in prompt sets: sizes, names, and that nothing of the training sets comes back in the test sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepalign import prompts
from deepalign.prompts import BUILTIN_SETS, builtin_prompts
from deepalign.records import Prompt

SHOULD_REFUSE = ("should-refuse", "should-refuse-styles")
TRAIN = tuple(name for name in BUILTIN_SETS if name.endswith("-train"))
TEST = tuple(name for name in BUILTIN_SETS if name not in TRAIN)
MIN_ANSWER_TOKENS = 160
"""The deepest prefill of the default audit."""
MAX_WORD_JACCARD = 0.5


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def behaviours(name: str) -> set[str]:
    return {prompt.behaviour for prompt in builtin_prompts(name)}


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index of two sets of words."""
    return len(one & other) / len(one | other)


def test_every_file_is_listed_and_every_listed_name_has_its_file() -> None:
    files = {path.stem for path in (Path(prompts.__file__).parent / "builtin").iterdir()}
    assert files == set(BUILTIN_SETS)
    assert set(TRAIN) == {"should-refuse-train", "benign-train", "look-alike-train"}


@pytest.mark.parametrize(
    ("names", "least"),
    [
        (("should-refuse",), 90),
        (SHOULD_REFUSE, 120),
        (("benign",), 120),
        (("look-alike",), 60),
    ],
)
def test_sizes(names: tuple[str, ...], least: int) -> None:
    assert sum(len(builtin_prompts(name)) for name in names) >= least


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_the_described_number_is_the_number(name: str) -> None:
    """`deepalign list` and the docs give these figures."""
    found = builtin_prompts(name)
    told = [int(number) for number in re.findall(r"\b\d+\b", BUILTIN_SETS[name])]
    assert told[:1] in ([], [len(found)])
    assert told[1:2] in ([], [len({prompt.category for prompt in found})])
    assert told or name in TRAIN


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_categories(name: str) -> None:
    categories = [prompt.category for prompt in builtin_prompts(name)]
    assert len(set(categories)) >= 8
    assert "uncategorised" not in categories


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_ids_and_texts_are_unique_and_one_line_each(name: str) -> None:
    found = builtin_prompts(name)
    assert len({prompt.prompt_id for prompt in found}) == len(found)
    assert len({" ".join(sorted(words(prompt.text))) for prompt in found}) == len(found)
    for prompt in found:
        assert prompt.text == prompt.text.strip()
        assert prompt.text.isprintable(), f"{prompt.prompt_id} is not one plain line"
        assert 1 < len(prompt.text.split()) < 120
        assert prompt.behaviour
        assert prompt.prompt_id.startswith(f"{prompt.category}/")


def test_ids_are_unique_over_the_test_sets() -> None:
    ids = [prompt.prompt_id for name in TEST for prompt in builtin_prompts(name)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("test", TEST)
@pytest.mark.parametrize("train", TRAIN)
def test_no_behaviour_is_both_trained_and_tested(train: str, test: str) -> None:
    assert behaviours(train) & behaviours(test) == set()


@pytest.mark.parametrize("test", TEST)
@pytest.mark.parametrize("train", TRAIN)
def test_no_near_duplicates_between_train_and_test(train: str, test: str) -> None:
    trained = [(prompt, words(prompt.text)) for prompt in builtin_prompts(train)]
    for prompt in builtin_prompts(test):
        mine = words(prompt.text)
        nearest, theirs = max(trained, key=lambda pair: overlap(mine, pair[1]))
        assert overlap(mine, theirs) < MAX_WORD_JACCARD, f"{prompt.text!r} is close to {nearest.text!r}"


@pytest.mark.parametrize("name", [*TRAIN, "benign", "benign-styles", "look-alike"])
def test_only_prefilled_sets_have_answers(name: str) -> None:
    assert [prompt.prompt_id for prompt in builtin_prompts(name) if prompt.answer is not None] == []


@pytest.mark.parametrize("name", SHOULD_REFUSE)
def test_every_should_refuse_prompt_has_an_answer_of_its_own(name: str) -> None:
    found: tuple[Prompt, ...] = builtin_prompts(name)
    assert [prompt.prompt_id for prompt in found if not prompt.answer] == [], "these have no answer"
    # No token is shorter than a character, so this much is needed in any vocabulary.
    short = [prompt.prompt_id for prompt in found if len(prompt.answer or "") < MIN_ANSWER_TOKENS]
    assert short == []
    assert len({prompt.answer for prompt in found}) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOULD_REFUSE)
def test_every_answer_reaches_the_deepest_prefill_in_testbed_tokens(name: str) -> None:
    from deepalign.testbed.weights import GGUF_SHA256, cache_folder

    weights = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if not (weights / "tokenizer.json").is_file():
        pytest.skip("the testbed's tokenizer is not in the cache; deepalign audit testbed:base fetches it")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights)
    lengths = {
        prompt.prompt_id: len(tokenizer(prompt.answer or "", add_special_tokens=False)["input_ids"])
        for prompt in builtin_prompts(name)
    }
    assert {key: length for key, length in lengths.items() if length < MIN_ANSWER_TOKENS} == {}
