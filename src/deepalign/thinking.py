"""Where a prefill is put in a reasoning model's turn, and how its thoughts are told from its answer.

Three sites, which are three different attacks. `raw`: right after the template's generation prompt, whatever that
leaves open. `content`: where the answer begins, past the thinking block. `reasoning`: inside the thinking block. The
texts between them are found by rendering a turn with probes in it, never by the model's name; templates that know no
field for thoughts but name `<think>` are read as the models behind them write. Knows nothing of attacks or judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deepalign.errors import UserError
from deepalign.records import Site

_FIELDS = ("reasoning_content", "thinking", "reasoning")
_THOUGHT, _ANSWER = "deepalign-thought-probe", "deepalign-answer-probe"
_OPEN, _CLOSE = "<think>", "</think>"
_LATEST_OPENING = 2
"""Tokens, such as line breaks, that may stand before the marker that opens thoughts."""

Turns = list[dict[str, str]]
RenderText = Callable[[Turns, bool], str]
"""Turns, and whether to open the assistant's, to text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """How one template writes an assistant's turn that holds thoughts; texts follow the turns before it."""

    opened: str
    """From the end of the turns before to the first thought."""
    closed: str
    """From the last thought to the answer."""
    starts_open: bool
    """Whether the generation prompt already stands inside the thoughts."""

    opening: str
    """What the model itself writes to begin its thoughts, where the generation prompt does not."""

    @property
    def closing(self) -> str:
        """What marks their end."""
        return _CLOSE if _CLOSE in self.closed else self.closed.strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Markers:
    """The token ids between which a model thinks."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    starts_open: bool
    """Whether the generation prompt already stands inside the thoughts."""


def markers(tokenizer: Any, render_text: RenderText) -> Markers | None:
    """The markers in a model's own tokens; None where the template knows no thoughts."""
    thinking = find_thinking(render_text)
    if thinking is None:
        return None
    opening, closing = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (thinking.opening, thinking.closing)
    )
    return Markers(opening=opening, closing=closing, starts_open=thinking.starts_open)


def find_thinking(render_text: RenderText) -> Thinking | None:
    """How a template writes thoughts; None where it knows none."""
    turns: Turns = [{"role": "user", "content": "Hi"}]
    before, prompted = render_text(turns, False), render_text(turns, True)
    for field in _FIELDS:
        answered = [*turns, {"role": "assistant", field: _THOUGHT, "content": _ANSWER}]
        try:
            text = render_text(answered, False)
        except UserError:
            continue
        if _THOUGHT in text and _ANSWER in text and text.index(_THOUGHT) < text.index(_ANSWER):
            start = len(before) if text.startswith(before) else 0
            opened = text[start : text.index(_THOUGHT)]
            closed = text[text.index(_THOUGHT) + len(_THOUGHT) : text.index(_ANSWER)]
            if opened.strip() and closed.strip():
                written = opened.removeprefix(prompted[len(before) :]).strip()
                open_now = _inside(prompted)
                return Thinking(opened=opened, closed=closed, starts_open=open_now, opening="" if open_now else written)
    if _inside(prompted):
        return Thinking(opened=prompted[len(before) :], closed=f"\n{_CLOSE}\n\n", starts_open=True, opening="")
    return None


def site_text(render_text: RenderText, turns: Turns, site: Site) -> str | None:
    """The text after the turns up to where a prefill at a site begins; None where that is the generation prompt.

    Raises:
        UserError: The template has no thinking block to put a prefill into.
    """
    if site == "raw":
        return None
    before, prompted = render_text(turns, False), render_text(turns, True)
    thinking = find_thinking(render_text)
    if thinking is None and site == "content":
        return None
    if thinking is None:
        raise UserError("--site reasoning: the chat template has no thinking block; use --site content or raw")
    if site == "reasoning":
        if thinking.starts_open:
            return None
        return thinking.opened
    answered = render_text([*turns, {"role": "assistant", "content": _ANSWER}], False)
    if _ANSWER not in answered or not answered.startswith(before):
        raise UserError("--site content: the chat template drops or moves the assistant's text; use --site raw")
    opened = answered[len(before) : answered.index(_ANSWER)]
    return None if opened.rstrip(" ") == prompted[len(before) :].rstrip(" ") else opened


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which of the written ids are thoughts, and which the answer."""

    first: int
    """Where the thoughts begin, past the marker that opens them."""
    last: int
    """Where they end; no thoughts where it equals `first`."""
    answer: int
    """Where the answer begins, past the marker that closes the thoughts."""
    unfinished: bool
    """Whether the thoughts were still going on at the end."""


def split_thoughts(ids: Sequence[int], marked: Markers, *, inside: bool) -> Split:
    """Tell thoughts from answer.

    Args:
        ids: What a model wrote.
        marked: The markers of its thoughts.
        inside: Whether it began to write inside its thoughts.
    """
    first = 0
    if not inside:
        found = find(ids, marked.opening)
        # Only what comes first opens a block of thoughts: later the marker is something that the answer talks of.
        if found is None or found > _LATEST_OPENING:
            return Split(first=0, last=0, answer=0, unfinished=False)
        first = found + len(marked.opening)
    length = find(ids[first:], marked.closing)
    if length is None:
        return Split(first=first, last=len(ids), answer=len(ids), unfinished=True)
    last = first + length
    return Split(first=first, last=last, answer=last + len(marked.closing), unfinished=False)


def find(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Index at which a run of ids begins; None where it does not occur."""
    if not wanted:
        return None
    for start in range(len(ids) - len(wanted) + 1):
        if tuple(ids[start : start + len(wanted)]) == tuple(wanted):
            return start
    return None


def _inside(prompted: str) -> bool:
    """Whether a generation prompt ends inside a `<think>` block."""
    return prompted.rstrip().endswith(_OPEN)
