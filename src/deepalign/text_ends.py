"""Where each token of an answer ends in its text, in time that grows with the answer and not with its square.

Knows nothing of tokenizers but that they decode. A token's text depends on its neighbours (a character of several
bytes, a leading space, punctuation that is pulled close), so that tokens are decoded in a window that begins with some
that came before. The end of the last token is known from the whole text: where the two differ, every token is decoded
from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_WINDOW = 16
_UNFINISHED = "\ufffd"
"""What a decoder writes for a character of which bytes are missing."""


def added_text(decode: Decode, lead: Sequence[int], ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """What `ids` add to the text of `lead`, and the length of that after each of them.

    A character split over the border belongs to what is added.

    Args:
        decode: Ids to text; special tokens may be left out.
        lead: What came before.
        ids: What is added.
    """
    before, whole = decode(lead), decode([*lead, *ids])
    kept = before.rstrip(_UNFINISHED)
    first = len(kept) if whole.startswith(kept) else len(before)
    text = whole[first:]
    lengths = _lengths(decode, lead, ids, len(before)) if whole.startswith(kept) else []
    if not ids or lengths[-1:] == [len(whole)]:
        return text, tuple(max(0, length - first) for length in lengths)
    return text, tuple(_one_by_one(decode, lead, ids, before))


def _lengths(decode: Decode, lead: Sequence[int], ids: Sequence[int], known: int) -> list[int]:
    """Length of the text of `lead` and the first n of `ids`, for each n; `known` is that of `lead` alone."""
    together = [*lead, *ids]
    # `known` characters end at token `mark`; the window that is decoded begins at `start`, with the tokens before it.
    start, mark = 0, len(lead)
    at_mark = len(decode(together[start:mark]))
    found = []
    for end in range(mark + 1, len(together) + 1):
        window = decode(together[start:end])
        found.append(known + len(window) - at_mark)
        if end - mark >= _WINDOW and not window.endswith(_UNFINISHED) and len(window) > at_mark:
            here = decode(together[mark:end])
            if here and not here.startswith(_UNFINISHED):
                start, mark, known, at_mark = mark, end, found[-1], len(here)
    return found


def _one_by_one(decode: Decode, lead: Sequence[int], ids: Sequence[int], before: str) -> list[int]:
    """The same by its definition."""
    kept = before.rstrip(_UNFINISHED)
    ends = []
    for count in range(1, len(ids) + 1):
        whole = decode([*lead, *ids[:count]])
        ends.append(len(whole[len(kept) :] if whole.startswith(kept) else whole[len(before) :]))
    return ends
