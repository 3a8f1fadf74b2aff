"""The rows of a deepening run, in the order in which they are trained on: recovery examples beside anchors (Eq. 2).

Every optimizer step holds the same numbers of both. Which rows, and how long a harmful beginning is, depends on the
seed, the epoch and the row's number only, so that it is the same for any number of processes and after any
interruption. Token ids in, token ids out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepalign.chat import Rendered
from deepalign.errors import UserError
from deepalign.recovery import RecoverySchedule, recovery_example
from deepalign.training.objective import IGNORED
from deepalign.training.rows import GROUPS

RECOVERY, ANCHOR, TRANSITION = range(3)
"""Groups of tokens, each with a weight of its own in the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySource:
    """A harmful prompt with an answer to begin and a refusal to turn to."""

    prompt: Rendered
    harmful_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    """With the end of the turn, so that the model learns to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """A harmless prompt with the answer to keep."""

    prompt: Rendered
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePlan:
    """How many of what are trained on.

    Raises:
        UserError: A number cannot be meant.
    """

    schedule: RecoverySchedule = field(default_factory=RecoverySchedule)
    alpha: float = 0.2
    """Weight of the recovery examples' mean loss; the anchors have the rest (Eq. 2)."""
    dense: float = 0.0
    """Share of alpha that goes to turning from every position of the harmful beginning at once (DeRTa's RTO)."""
    epochs: int = 10
    """Over the recovery sources."""
    recovery_batch: int = 16
    anchor_batch: int = 64
    max_length: int = 512
    """Most tokens of a row."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise UserError(f"--alpha {self.alpha} is outside (0, 1)")
        if not 0.0 <= self.dense < 1.0:
            raise UserError(f"--dense {self.dense} is outside [0, 1)")
        for name in ("epochs", "recovery_batch", "anchor_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.recovery_batch + self.anchor_batch

    @property
    def group_weights(self) -> list[float]:
        """Weight of each group's mean loss, in the order of the groups."""
        return [self.alpha * (1.0 - self.dense), 1.0 - self.alpha, self.alpha * self.dense]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Rows in training order, `step_rows` to a step."""

    rows: list[dict[str, Any]]
    num_steps: int
    num_too_long: int
    """Recovery sources left out because prompt and refusal alone are longer than a row may be."""
    num_cut_anchors: int
    """Anchors whose answer was cut to fit."""


def mix(
    sources: Sequence[RecoverySource], anchors: Sequence[Anchor], plan: MixturePlan, stop_ids: Collection[int]
) -> Mixture:
    """All rows of a run.

    Within a step, rows stand by length, so that little of a micro-batch is padding.

    Raises:
        UserError: There is nothing to recover from, or nothing to hold on to.
    """
    fitting = [one for one in sources if len(one.prompt.ids) + len(one.refusal_ids) <= plan.max_length]
    held = [one for one in anchors if len(one.prompt.ids) < plan.max_length and one.answer_ids]
    for found, what in ((fitting, "harmful prompt with an answer and a refusal"), (held, "harmless prompt answered")):
        if not found:
            raise UserError(f"no {what} fits into --max-length {plan.max_length}; raise it or give other prompts")
    steps_per_epoch = -(-len(fitting) // plan.recovery_batch)
    num_steps = steps_per_epoch * plan.epochs
    draws = _endless(len(held), plan.seed, stream=1)
    rows: list[dict[str, Any]] = []
    for epoch in range(plan.epochs):
        order = _order(len(fitting), plan.seed, 0, epoch)
        # The last step of an epoch is filled up from its beginning.
        order += order[: steps_per_epoch * plan.recovery_batch - len(order)]
        order = (order * (1 + plan.recovery_batch // len(fitting)))[: steps_per_epoch * plan.recovery_batch]
        for start in range(0, len(order), plan.recovery_batch):
            step = [
                recovery_row(fitting[number], plan.schedule.tokens(epoch, number), plan, stop_ids)
                for number in order[start : start + plan.recovery_batch]
            ]
            step += [anchor_row(held[next(draws)], plan.max_length) for _ in range(plan.anchor_batch)]
            rows += sorted(step, key=lambda row: -len(row["input_ids"]))
    return Mixture(
        rows=rows,
        num_steps=num_steps,
        num_too_long=len(sources) - len(fitting),
        num_cut_anchors=sum(len(one.prompt.ids) + len(one.answer_ids) > plan.max_length for one in held),
    )


def recovery_row(source: RecoverySource, k: int, plan: MixturePlan, stop_ids: Collection[int]) -> dict[str, Any]:
    """Splice x + h[:k] + r with loss on r; with `dense`, also on turning to its first token from anywhere in h[:k]."""
    found = recovery_example(
        source.prompt, source.harmful_ids, source.refusal_ids, k, stop_ids=stop_ids, max_length=plan.max_length
    )
    labels = [token if mine else IGNORED for token, mine in zip(found.ids, found.loss_mask, strict=True)]
    groups = [RECOVERY] * len(labels)
    if plan.dense > 0.0:
        start = len(source.prompt.ids)
        for place in range(start, start + found.k):
            labels[place], groups[place] = source.refusal_ids[0], TRANSITION
    return {"input_ids": list(found.ids), "labels": labels, GROUPS: groups}


def anchor_row(anchor: Anchor, max_length: int) -> dict[str, Any]:
    """A prompt and its answer, cut at the end where it is too long."""
    ids = [*anchor.prompt.ids, *anchor.answer_ids][:max_length]
    start = len(anchor.prompt.ids)
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:], GROUPS: [ANCHOR] * len(ids)}


def _order(count: int, seed: int, stream: int, epoch: int) -> list[int]:
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, epoch])))
    return [int(number) for number in draws.permutation(count)]


def _endless(count: int, seed: int, stream: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from _order(count, seed, stream, epoch)
        epoch += 1
