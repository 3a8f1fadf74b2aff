"""Whether a text can be judged at all: empty, undecodable, looping or cut off texts cannot.

Knows nothing of refusals but the list of their first words. Every function returns the reason, or "" for none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from deepalign.judges.folding import Folded, tokens

_REPLACEMENT = "\ufffd"
_MAX_REPLACEMENT_SHARE = 0.2
_MIN_LETTER_SHARE = 0.35
_MIN_SYMBOLS = 20
"""Shorter texts are not called gibberish for their symbols."""
_MIN_LOOP_WORDS = 12
_LOOP_SHARE = 0.6
_MIN_ROUNDS = 4
_MAX_PERIOD = 40
_MIN_LOOP_CHARS = 30
_MAX_CHAR_PERIOD = 8
_MIN_CUT_CHARS = 5
"""A cut inside a word is recognised from this many characters on."""
_MIN_VARIETY_WORDS = 40
_MIN_VARIETY = 0.12
_VARIETY_WINDOW = 200


def why_empty(folded: Folded) -> str:
    """No letter or digit at all."""
    if not folded.text.strip():
        return "empty"
    return "" if any(char.isalnum() for char in folded.text) else "no words"


def why_undecodable(text: str) -> str:
    """Mostly replacement characters or symbols where letters should be."""
    shown = [char for char in text if not char.isspace()]
    replaced = sum(1 for char in shown if char == _REPLACEMENT)
    if replaced > _MAX_REPLACEMENT_SHARE * len(shown):
        return "undecodable: replacement characters"
    letters = sum(1 for char in shown if unicodedata.category(char)[0] in "LNM")
    if len(shown) >= _MIN_SYMBOLS and letters < _MIN_LETTER_SHARE * len(shown):
        return "undecodable: mostly symbols"
    return ""


def why_looping(folded: Folded) -> str:
    """The same words again and again for most of the text, or hardly any different words in a long one."""
    words = tokens(folded.text)
    if len(words) >= _MIN_LOOP_WORDS and _longest_loop(words, _MAX_PERIOD) >= _LOOP_SHARE * len(words):
        return "degenerate: the same words again and again"
    different = len(set(words))
    if len(words) >= _MIN_VARIETY_WORDS and different < _MIN_VARIETY * min(len(words), _VARIETY_WINDOW):
        return f"degenerate: {different} different words in {len(words)}"
    letters = [char for char in folded.text if char.isalnum()]
    if len(letters) < _MIN_LOOP_CHARS or len(words) >= _MIN_LOOP_WORDS:
        return ""
    looping = _longest_loop(letters, _MAX_CHAR_PERIOD) >= _LOOP_SHARE * len(letters)
    return "degenerate: the same letters again and again" if looping else ""


def _longest_loop(items: Sequence[str], max_period: int) -> int:
    """Length of the longest stretch that repeats one unit of at most `max_period` items, at least four times."""
    longest = 0
    for period in range(1, min(max_period, len(items) // _MIN_ROUNDS) + 1):
        run = 0
        for index in range(period, len(items)):
            run = run + 1 if items[index] == items[index - period] else 0
            if run >= period * (_MIN_ROUNDS - 1):
                longest = max(longest, run + period)
    return longest


def why_cut_off(folded: Folded, openings: Sequence[str]) -> str:
    """The whole text is the first words of a refusal, and of many other sentences."""
    start = folded.text.strip().strip('"').strip()
    for opening in openings:
        rest = opening[len(start) :]
        if start and opening.startswith(start) and rest and (not rest[0].isalpha() or len(start) >= _MIN_CUT_CHARS):
            return "cut off before it can be told"
    return ""
