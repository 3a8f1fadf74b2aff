"""What calls cost: counted as they come, told in tokens and in money."""

from __future__ import annotations

from dataclasses import dataclass

from deepalign.endpoints.exchange import Reply

_MILLION = 1_000_000


@dataclass(kw_only=True, slots=True)
class Spending:
    """Counts of one sitting, or of several added up."""

    calls: int = 0
    """Calls that were made, those that failed too."""
    from_cache: int = 0
    """Replies that were there already."""
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_counts: int = 0
    """Replies whose server told no token counts: the sums are too low by theirs."""

    def add(self, reply: Reply) -> None:
        """Count a reply from a server."""
        self.calls += reply.tries
        if reply.status == "failed":
            self.failed += 1
        elif reply.prompt_tokens is None or reply.completion_tokens is None:
            self.without_counts += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Per million tokens, in whatever currency; None where unknown."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Price of some tokens; None where a price is unknown."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _MILLION
