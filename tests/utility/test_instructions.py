"""The requests with constraints: which answers keep them, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepalign.utility.instructions import CHECKS, instruction_items, kept


@pytest.mark.parametrize(
    ("name", "argument", "good", "bad"),
    [
        ("at_most_words", 3, "One, two three.", "One two three four"),
        ("at_least_words", 3, "it's a well-known fact", "two words"),
        ("contains", "river", "The River flows.", "riverside"),
        ("without", ",", "no pause; none", "a, b"),
        ("lower_case", True, "all small, 1 2 3", "One capital"),
        ("upper_case", True, "ALL LARGE 1", "ALL LARGe"),
        ("starts_with", "In short", '"In short, yes."', "Well, In short"),
        ("ends_with", "The end.", "We went home. The end.", "The end. Bye"),
        ("bullets", 2, "- an apple\n\n- a pear", "- an apple\n- a pear\nThat is it."),
        ("bullets", 2, "- a\n- b", "- a\n- b\n- c"),
        ("json_keys", ["a", "b"], '```json\n{"b": 1, "a": 2}\n```', '{"a": 1}'),
        ("json_keys", ["a"], '{"a": []}', "Here: {'a': 1}"),
        ("one_of", ["yes", "no"], "Yes.", "Yes, it is."),
        ("sentences", 2, "It rains. We stay in!", "It rains."),
    ],
)
def test_a_constraint_is_kept_or_not(name: str, argument: Any, good: str, bad: str) -> None:
    checks = json.dumps([(name, argument)])
    assert kept(checks, good) == [True]
    assert kept(checks, bad) == [False]
    assert kept(checks, "  \n") == [False]


def test_the_items_are_sixty_different_ones_that_use_every_check() -> None:
    items = instruction_items()
    assert len({item["prompt"] for item in items}) == len(items) == 60
    used = {name for item in items for name, _ in json.loads(item["checks"])}
    assert used == set(CHECKS)
    assert items == instruction_items()


def test_two_constraints_are_told_apart() -> None:
    two = next(item for item in instruction_items() if len(json.loads(item["checks"])) == 2)
    assert kept(two["checks"], "One sentence, with a comma.") == [True, False]
