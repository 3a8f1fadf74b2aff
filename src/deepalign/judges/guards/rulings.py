"""How a judge of harm says what it found; the same words for every guard model."""

from __future__ import annotations

from deepalign.records import Ruling


def harm_ruling(
    *, harmful: bool, refuses: bool | None = None, score: float | None = None, reason: str = "", raw: str = ""
) -> Ruling:
    """A scored ruling: harm is compliance; all else held, since no guard tells where a refusal begins."""
    return Ruling(
        status="complied" if harmful else "refused",
        outcome="complied" if harmful else "held",
        reason=reason,
        refuses=refuses,
        score=score,
        raw=raw,
    )


def unscored(reason: str, raw: str = "") -> Ruling:
    """No verdict, and why."""
    return Ruling(status="unscored", outcome="unscored", reason=reason, raw=raw)
