"""Requests with constraints that a program can check: what is asked, and whether an answer keeps to it.

In the spirit of IFEval (arXiv 2311.07911), with requests and checks of our own. A constraint is either kept or not;
what the answer says is not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_TOPICS = (
    "Describe a walk in the park.",
    "Explain why people sleep.",
    "Say what makes a good breakfast.",
    "Tell how rain is made.",
    "Describe the sea to a child.",
    "Say why trees are useful.",
    "Explain what a library is for.",
    "Tell what cats do all day.",
    "Describe a train journey.",
    "Say how to keep a room tidy.",
    "Explain why we brush our teeth.",
    "Describe the smell of fresh bread.",
)
_WORDS = ("window", "garden", "music", "river", "summer")
_OPENINGS = ("To begin with", "In short", "Dear reader", "As everyone knows", "Once a day")
_CLOSINGS = ("That is all.", "Thank you.", "The end.", "Have a nice day.", "Ask me again.")
_THINGS = ("fruits", "animals", "colours", "countries", "tools")
_YES_OR_NO = (
    "Is ice colder than steam?", "Can fish swim?", "Is a minute longer than an hour?", "Do birds have feathers?",
    "Is the Sun smaller than the Moon?",
)  # fmt: skip
_KEYS = (("name", "age"), ("city", "country"), ("title", "year"), ("fruit", "colour"), ("day", "hour"))


def instruction_items() -> list[dict[str, Any]]:
    """Sixty requests: `prompt`, and `checks` as JSON text of pairs of a check's name and its argument."""
    items = []
    for turn in range(5):
        word, opening, closing = _WORDS[turn], _OPENINGS[turn], _CLOSINGS[turn]
        most, least, bullets, sentences = 10 + 5 * turn, 30 + 5 * turn, 2 + turn, 1 + turn % 3
        topic = iter([_TOPICS[(turn + 5 * place) % len(_TOPICS)] for place in range(12)])
        one, other = _KEYS[turn]
        items += [
            _item(f"{next(topic)} Use at most {most} words.", ("at_most_words", most)),
            _item(f"{next(topic)} Use at least {least} words.", ("at_least_words", least)),
            _item(f'{next(topic)} Use the word "{word}".', ("contains", word)),
            _item(f"{next(topic)} Write in lower case only, without any capital letter.", ("lower_case", True)),
            _item(f"{next(topic)} WRITE IN CAPITAL LETTERS ONLY.", ("upper_case", True)),
            _item(f'{next(topic)} Begin your answer with the words "{opening}".', ("starts_with", opening)),
            _item(f'{next(topic)} End your answer with the words "{closing}"', ("ends_with", closing)),
            _item(f"{next(topic)} Do not use any comma.", ("without", ",")),
            _item(
                f'List {bullets} {_THINGS[turn]}, each on its own line that begins with "- ". Write nothing else.',
                ("bullets", bullets),
            ),
            _item(
                f'Answer with a JSON object with the keys "{one}" and "{other}" and nothing else. Make up the values.',
                ("json_keys", [one, other]),
            ),
            _item(f"{_YES_OR_NO[turn]} Answer with one word: yes or no.", ("one_of", ["yes", "no"])),
            _item(
                f"{next(topic)} Write exactly {sentences} sentence{'s' if sentences > 1 else ''}, and use no comma.",
                ("sentences", sentences), ("without", ","),
            ),
        ]  # fmt: skip
    return items


def kept(checks: str, response: str) -> list[bool]:
    """Which of an item's constraints an answer keeps; an empty answer keeps none."""
    text = response.strip()
    return [bool(text) and CHECKS[name](text, argument) for name, argument in json.loads(checks)]


def _item(prompt: str, *checks: tuple[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, "checks": json.dumps(checks)}


def _num_words(text: str) -> int:
    return len(re.findall(r"\w+(?:['’-]\w+)*", text))


def _bullets(text: str, count: int) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return len(lines) == count and all(re.match(r"- \S", line) for line in lines)


def _json_keys(text: str, keys: list[str]) -> bool:
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    try:
        found = json.loads(bare)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def _num_sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"'”’)]*\s+", text) if re.search(r"\w", part)])


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "at_most_words": lambda text, count: _num_words(text) <= count,
    "at_least_words": lambda text, count: _num_words(text) >= count,
    "contains": lambda text, word: re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None,
    "without": lambda text, piece: piece not in text,
    "lower_case": lambda text, _: any(map(str.isalpha, text)) and text == text.lower(),
    "upper_case": lambda text, _: any(map(str.isalpha, text)) and text == text.upper(),
    "starts_with": lambda text, words: text.strip("\"'“”").startswith(words),
    "ends_with": lambda text, words: text.strip("\"'“”").endswith(words),
    "bullets": _bullets,
    "json_keys": _json_keys,
    "one_of": lambda text, words: text.strip(" .!\"'").lower() in words,
    "sentences": lambda text, count: _num_sentences(text) == count,
}
"""Whether a text that is not empty keeps a constraint, by the constraint's name."""
