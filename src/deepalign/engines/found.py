"""What the trial of a server found, as it is told and kept, and whether two servers are one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepalign.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one server does; all of it goes into the manifest."""

    url: str
    model: str
    way: str
    """Name of the dialect."""
    written_ids: str
    """"returned" by the server, or "from text"."""
    read_ids: str
    """What it tells of the ids that it read: "echoed", "counted" or "untold"."""
    prefill: str
    """Forced beginnings after which it went on as it would have, of those tried; "" where none was needed."""
    tokenizer: str
    """Whether it cuts a text as the tokenizer here does: "agrees", "differs" or "untold"."""
    seeds: bool
    """Whether a seed brings the same draws back."""
    greedy_repeats: bool
    """Whether it writes the same greedily, asked twice."""
    left_out: str
    """Settings of the sampler that it does not take."""
    greedy: tuple[tuple[int, ...], ...]
    """What it writes greedily to the texts of the trial."""

    @property
    def told(self) -> str:
        """One line for the user."""
        parts = [
            f"{self.model} at {self.url} ({self.way}): "
            + ("text in" if self.way == "chat" else f"token ids in ({self.read_ids})")
            + f", ids out {self.written_ids}"
        ]
        if self.prefill:
            parts.append(f"goes on after a prefill ({self.prefill})")
        if self.tokenizer != "untold":
            parts.append(f"its tokenizer {self.tokenizer}")
        parts.append("seeds repeat draws" if self.seeds else "draws do not repeat, whatever the seed")
        if not self.greedy_repeats:
            parts.append("greedy answers vary")
        if self.left_out:
            parts.append(f"does not take {self.left_out}")
        return "; ".join(parts)


def check_alike(first: Found, other: Found) -> None:
    """Refuse servers of one run that differ; raises `UserError`."""
    if (first.model, first.way, first.left_out) != (other.model, other.way, other.left_out):
        raise UserError(
            f"{first.url} serves {first.model} ({first.way}) and {other.url} {other.model} ({other.way}); "
            "all servers of a run must be alike"
        )
    if same_greedy(first.greedy, other.greedy) == 0:
        raise UserError(f"{first.url} and {other.url} answer differently; all servers must hold the same weights")


def same_greedy(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> int:
    """To how many texts of the trial two servers write the same; rounding may change one of them, other weights all."""
    return sum(tuple(mine) == tuple(theirs) for mine, theirs in zip(one, other, strict=True))
