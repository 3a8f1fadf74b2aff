"""Safety-recovery examples (paper section 3): a harmful answer that has begun, and the refusal that it turns into.

A transform of token ids, independent of any trainer: prompt x, harmful answer h and refusal r become x + h[:k] + r with
the loss on r alone. How long the beginning is depends on the seed, the epoch and the example's number only, so that it
is the same on one process and on many.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from deepalign.chat import Rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySchedule:
    """How many tokens of the harmful answer are forced: none with probability 1 - share, else 1 to `longest`, evenly.

    Raises:
        ValueError: The share is no probability, or `longest` is not at least 1.
    """

    share: float = 0.5
    """Probability p of a beginning; the paper's default."""
    longest: int = 100
    """Most tokens C of it; the paper's default."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share is {self.share}; give a probability, 0 to 1")
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}; give 1 or more tokens")

    def tokens(self, epoch: int, index: int) -> int:
        """Tokens of example `index` in an epoch; both count from 0."""
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, index])))
        begun = draws.random() < self.share
        return int(draws.integers(1, self.longest, endpoint=True)) if begun else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryExample:
    """One training sequence."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True at the refusal's tokens only."""
    k: int
    """Tokens of the harmful answer that it really holds."""
    num_cut: int
    """Tokens of it that were asked for and left out, because it or the room for it is shorter."""


def recovery_example(
    prompt: Rendered,
    harmful_ids: Sequence[int],
    refusal_ids: Sequence[int],
    k: int,
    *,
    stop_ids: Collection[int],
    max_length: int | None = None,
) -> RecoveryExample:
    """Splice x + h[:k] + r.

    Where the whole is too long, the harmful beginning gets shorter from its end; the refusal is never cut.

    Args:
        prompt: The conversation up to the assistant's turn, without an answer.
        harmful_ids: Response tokens of the harmful answer; what stands from the first stop token on is dropped, since
            a turn that has ended is not recovered from.
        refusal_ids: Response tokens of the refusal, its end of turn included if the model is to learn to stop.
        k: Tokens of the harmful answer to force.
        stop_ids: Tokens that end a turn.
        max_length: Most tokens of the sequence.

    Raises:
        ValueError: There is no refusal, k is negative, the prompt holds an answer already, or prompt and refusal alone
            are longer than `max_length`.
    """
    if not refusal_ids:
        raise ValueError("the refusal is empty; there would be nothing to learn")
    if k < 0:
        raise ValueError(f"k is {k}; give 0 or more tokens")
    if any(prompt.response_mask):
        raise ValueError("the prompt holds an answer already; render it without one")
    end = next((place for place, token in enumerate(harmful_ids) if token in stop_ids), len(harmful_ids))
    room = len(harmful_ids)
    if max_length is not None:
        room = max_length - len(prompt.ids) - len(refusal_ids)
        if room < 0:
            raise ValueError(
                f"prompt and refusal have {len(prompt.ids)} + {len(refusal_ids)} tokens, more than {max_length}"
            )
    held = min(k, end, room)
    ids = (*prompt.ids, *harmful_ids[:held], *refusal_ids)
    mask = (False,) * (len(prompt.ids) + held) + (True,) * len(refusal_ids)
    return RecoveryExample(ids=ids, loss_mask=mask, k=held, num_cut=k - held)
