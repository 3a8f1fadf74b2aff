"""Folded text: what the rules read, with the way back to the characters of the original.

Owns case, accents, curly punctuation, markdown marks, white space, emoji, and which parts are quotations. Knows no
refusal phrase but the first words of one that is glued to another word. Every folded character remembers the original
character it came from, so positions survive.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

_APOSTROPHES = "'\u2018\u2019\u201a\u201b\u02bc\u2032\uff07"
_STRAIGHT = '"\uff02\u2033'
_OPENING = "\u201c\u201e\u201f\u00ab\u300c\u300e"
_CLOSING = "\u201d\u00bb\u300d\u300f"
_DASHES = "\u2013\u2014\u2015\u2e3a"
_MARKDOWN = "*_~#`"
_PARTNERS = {
    "\u201e": "\u201c\u201d",
    "\u201c": "\u201d\u201c",
    "\u00ab": "\u00bb",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
}
_TABLE = (
    dict.fromkeys(_APOSTROPHES, "'")
    | dict.fromkeys(_STRAIGHT, '"')
    | {mark: mark for mark in _OPENING + _CLOSING}
    | dict.fromkeys(_DASHES, "\u2014")
    | dict.fromkeys(_MARKDOWN, "")
    | dict.fromkeys("\n\r\x0b\x0c\x85\u2028\u2029", "\n")
    | {"\t": " ", "|": " ", "\u3002": ". ", "\uff61": ". ", "\uff01": "! ", "\uff1f": "? ", "\u3001": ","}
)
_FIRST_PICTOGRAPH = "\u2190"
_GLUED = re.compile(
    r"(?<=[a-z0-9.!?,])(?=I(?:['\u2019](?:m|d)|(?: am| can(?:not|['\u2019]t| not)| won['\u2019]t| will not| must))\b)"
)
"""Where a model breaks off in the middle of a word, or forgets the space, to speak for itself: "the doI cannot"."""
_SPEAKER = re.compile(r"(?:(?<=\n)|\A) ?((?!assistant|ai\b|bot\b|model\b|step\b)[a-z]{2,15}(?: [a-z]{2,15})?): [^\n]*")
_WORD = re.compile(r"[^\W_]")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[\w'])+")
_CJK_PER_WORD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """A text made comparable."""

    text: str
    origins: tuple[int, ...]
    """`origins[i]`: index in the original of folded character i; one more entry for the end."""

    def original(self, position: int) -> int:
        """Index in the original text of a folded position."""
        return self.origins[position]


@lru_cache(maxsize=8192)
def _fold_char(char: str) -> str:
    known = _TABLE.get(char)
    if known is not None:
        return known
    pieces = []
    for piece in unicodedata.normalize("NFKD", char).lower():
        category = unicodedata.category(piece)
        if piece in _TABLE:
            pieces.append(_TABLE[piece])
        elif category in ("Mn", "Me", "Cf", "Cc", "Cs", "Co", "Cn"):
            continue
        elif category.startswith("Z"):
            pieces.append(" ")
        else:
            pieces.append(";" if category == "So" and piece >= _FIRST_PICTOGRAPH else piece)
    return "".join(pieces)


def _is_backtick_apostrophe(text: str, index: int) -> bool:
    return (
        text[index] in "`\u00b4"
        and 0 < index < len(text) - 1
        and text[index - 1].isalpha()
        and text[index + 1].isalpha()
    )


def fold(text: str) -> Folded:
    """Fold a text: lower case, no accents or markdown, straight apostrophes, white-space runs as one character.

    Words that a refusal is glued to end their line.
    """
    folded: list[str] = []
    origins: list[int] = []
    glued = {match.start() for match in _GLUED.finditer(text)}
    for index, char in enumerate(text):
        if index in glued:
            folded.append("\n")
            origins.append(index)
        for piece in "'" if _is_backtick_apostrophe(text, index) else _fold_char(char):
            if piece in " \n" and folded and folded[-1] in " \n":
                if piece == "\n":
                    folded[-1] = piece
                continue
            folded.append(piece)
            origins.append(index)
    return Folded(text="".join(folded), origins=(*origins, len(text)))


def tokens(text: str) -> list[str]:
    """Words of a folded text; each Chinese or Japanese character is one."""
    return _TOKEN.findall(text)


def count_words(text: str) -> int:
    """Number of words; two Chinese or Japanese characters count as one."""
    found = tokens(text)
    single = sum(1 for token in found if len(token) == 1 and token >= "\u3040")
    return len(found) - single + -(-single // _CJK_PER_WORD)


class Quotations:
    """The quoted parts of a folded text: what someone else says in it.

    A quotation ends with its mark or with the line. One that opens the text and does not end before the text does is
    the whole answer put in quotation marks, hence no quotation; a "> " line counts as quoted unless it opens the text.
    The lines of a script ("Bob: ...") are quoted where a speaker has at least two; the assistant is no such speaker.
    """

    def __init__(self, text: str) -> None:
        """Find the quotations of a folded text."""
        words = [match.start() for match in _WORD.finditer(text)]
        first_word, last_word = (words[0], words[-1]) if words else (len(text), -1)
        self._starts: list[int] = []
        self._reaches: list[int] = []
        reach = 0
        for start, end in sorted(_double_quoted(text) + _single_quoted(text) + _block_quoted(text) + _spoken(text)):
            wraps_all = start < first_word and (end > last_word or text[end : end + 1] == "\n")
            if not wraps_all:
                reach = max(reach, end)
                self._starts.append(start)
                self._reaches.append(reach)

    def cover(self, position: int) -> bool:
        """Whether a position lies inside a quotation."""
        index = bisect.bisect_right(self._starts, position) - 1
        return index >= 0 and position < self._reaches[index]


def _double_quoted(text: str) -> list[tuple[int, int]]:
    spans = []
    opened: int | None = None
    for index, char in enumerate(text):
        if char == "\n":
            if opened is not None:
                spans.append((opened, index))
            opened = None
        elif opened is None:
            before = text[index - 1] if index else " "
            after = text[index + 1] if index + 1 < len(text) else " "
            if char in _OPENING or (
                char == '"' and not before.isalnum() and before not in ".,!?" and not after.isspace()
            ):
                opened = index
        elif char in _PARTNERS.get(text[opened], text[opened] + _CLOSING):
            spans.append((opened, index + 1))
            opened = None
    return [*spans, (opened, len(text))] if opened is not None else spans


def _single_quoted(text: str) -> list[tuple[int, int]]:
    spans = []
    opened: int | None = None
    for index, char in enumerate(text):
        if char == "\n":
            opened = None
        elif char == "'":
            before = text[index - 1] if index else " "
            after = text[index + 1] if index + 1 < len(text) else " "
            if opened is None:
                if not before.isalnum() and before != "'" and after.isalpha():
                    opened = index
            elif not before.isspace() and not after.isalnum():
                spans.append((opened, index + 1))
                opened = None
    return spans


def _block_quoted(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"(?:(?<=\n)|\A) ?>[^\n]*", text)]


def _spoken(text: str) -> list[tuple[int, int]]:
    lines = list(_SPEAKER.finditer(text))
    speakers = [line[1] for line in lines]
    return [line.span() for line in lines] if len(set(speakers)) < len(speakers) else []
