"""The search of rank-assisted prefilling: at every place the best-ranked token that a helper passes, else a step back.

After Vega & Singh 2025 (arXiv 2512.05518); `docs/rap.md` states the rule. Token ids in, token ids out: knows nothing of
prompts or of what a helper goes by (`rank_helpers.py`). One forward pass for each token that is written, for all rows
at a time; a step back costs none, since what the helper said of a place is kept. No row depends on its batch (up to the
rounding of low precision).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from deepalign.batching import Job, Row, batches, is_out_of_memory, most_rows
from deepalign.chat import Rendered
from deepalign.errors import UserError
from deepalign.records import Sampling
from deepalign.rewinding import Rewinding

logger = logging.getLogger("deepalign")
TOP = 20
"""Most probable tokens among which the published attack chooses."""
STEPS = 256
"""Choices and steps back that it takes at most."""
EndedBy = Literal["stop", "steps", "exhausted", ""]
"""A stop token that the helper passed; the most steps; a step back past the prefill; a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A place in an answer and the tokens that may come there."""

    index: int
    """Position of the row in the list of jobs."""
    ids: tuple[int, ...]
    """Prompt and answer so far."""
    response_start: int
    """Where the answer begins, the prefill included."""
    num_written: int
    """Tokens of the answer that are not prefill."""
    candidates: tuple[int, ...]
    """Token ids, the most probable first."""
    log_probs: tuple[float, ...]
    """Their log-probabilities under the target."""

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer so far, the prefill included."""
        return self.ids[self.response_start :]


class Helper(Protocol):
    """Says which continuations are harmful."""

    def begin(self) -> None:
        """Rows that are new, or begin anew, come next: nothing needs to be kept for those before."""

    def harmful(self, asks: Sequence[Ask]) -> list[list[bool]]:
        """For each place, whether the answer with each candidate behind it is harmful; the same, asked again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assisted:
    """What the search wrote after a job's ids."""

    index: int
    """Position of the job in the list that was given."""
    status: Literal["ok", "failed"]
    token_ids: tuple[int, ...] = ()
    """The ids that were written, without the stop token; none where the search was exhausted."""
    ended_by: EndedBy = ""
    backtracks: int = 0
    """Steps back, the one past the prefill too."""
    steps: int = 0
    """Choices and steps back."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What the search goes by, besides the helper."""

    stop_ids: frozenset[int]
    text_of: Callable[[int], str]
    top_k: int
    max_steps: int


@dataclass(slots=True)
class Search:
    """One row's search."""

    rule: Rule
    index: int
    ids: list[int]
    response_start: int
    num_given: int
    """Prompt and prefill."""
    steps: int = 0
    backtracks: int = 0
    ended_by: EndedBy = ""
    _levels: list[Sequence[int]] = field(default_factory=list)
    """Harmful tokens of each place that was written or is to be, best first."""

    def advance(self, harmful: Sequence[int]) -> None:
        """Choose a token at a new place, or, as far back as need be, at one before it.

        Args:
            harmful: The tokens that the helper passes there, best first.
        """
        self._levels.append(harmful)
        removed: int | None = None
        while self.steps < self.rule.max_steps:
            self.steps += 1
            token = self._best(removed)
            if token is not None and token in self.rule.stop_ids:
                self.ended_by = "stop"
                return
            if token is not None:
                self.ids.append(token)
                break
            self.backtracks += 1
            self._levels.pop()
            if not self._levels:
                self.ended_by = "exhausted"
                return
            removed = self.ids.pop()
        if self.steps >= self.rule.max_steps:
            self.ended_by = "steps"

    def _best(self, removed: int | None) -> int | None:
        """The best-ranked harmful token, after the removed one if that was harmful, that is no third repetition."""
        harmful = self._levels[-1]
        if removed is not None and removed in harmful:
            harmful = harmful[harmful.index(removed) + 1 :]
        before = [self.rule.text_of(token).strip() for token in self.ids[self.response_start :][-2:]]
        for token in harmful:
            if len(before) < 2 or not before[0] == before[1] == self.rule.text_of(token).strip():
                return token
        return None

    def result(self) -> Assisted:
        """What was written when it ended."""
        return Assisted(
            index=self.index,
            status="ok",
            token_ids=tuple(self.ids[self.num_given :]),
            ended_by=self.ended_by,
            backtracks=self.backtracks,
            steps=self.steps,
        )


def rank_assisted(
    model: Any,
    jobs: Sequence[Rendered],
    helper: Helper,
    *,
    stop_ids: Collection[int],
    text_of: Callable[[int], str],
    top_k: int = TOP,
    max_steps: int = STEPS,
    max_batch: int | None = None,
) -> Iterator[Assisted]:
    """Continue every job by the rule; yields in the order in which rows finish, each job exactly once.

    A job that does not fit the model's context, runs out of memory even alone, or meets non-finite logits yields
    `status="failed"` with the reason.

    Args:
        model: A `transformers` causal LM; not changed.
        jobs: Prompts, each with the harmful prefill as the response so far.
        helper: Says which tokens are harmful.
        stop_ids: Ids that end a row where the helper passes them.
        text_of: A token's text, by which repetitions are told.
        top_k: Most probable tokens to choose among.
        max_steps: Choices and steps back, for each row.
        max_batch: Most rows at a time, default what the device is fast with; memory may allow fewer.

    Raises:
        UserError: `top_k` or `max_steps` is less than 1.
    """
    for name, value in (("top_k", top_k), ("max_steps", max_steps)):
        if value < 1:
            raise UserError(f"{name} is {value}; rank-assisted prefilling needs 1 or more")
    rule = Rule(stop_ids=frozenset(stop_ids), text_of=text_of, top_k=top_k, max_steps=max_steps)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rows = []
    for index, job in enumerate(jobs):
        if limit is not None and len(job.ids) + max_steps > limit:
            reason = f"{len(job.ids)} input + {max_steps} new tokens exceed the model's {limit}"
            yield Assisted(index=index, status="failed", reason=reason)
        else:
            sampling = Sampling(temperature=0.0, max_new_tokens=max_steps)
            rows.append(Row(index=index, job=Job(ids=job.ids, sampling=sampling, seed=0), host=job.ids))
    reading = Rewinding(model, max_steps)
    for batch in batches(model, rows, most_rows(model, max_batch), shared=False):
        yield from _searched_or_split(reading, helper, rule, jobs, [row.index for row in batch])


def _searched_or_split(
    reading: Rewinding, helper: Helper, rule: Rule, jobs: Sequence[Rendered], batch: Sequence[int]
) -> Iterator[Assisted]:
    """One batch to its end; what memory does not hold in halves, from its beginning."""
    finished: set[int] = set()
    try:
        for result in _searched(reading, helper, rule, jobs, batch):
            finished.add(result.index)
            yield result
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    rest = [index for index in batch if index not in finished]
    reading.forget()
    helper.begin()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rest) == 1:
        yield Assisted(index=rest[0], status="failed", reason="out of memory, even alone")
        return
    logger.warning("out of memory with %d rows; going on with half", len(rest))
    for part in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
        yield from _searched_or_split(reading, helper, rule, jobs, part)


def _searched(
    reading: Rewinding, helper: Helper, rule: Rule, jobs: Sequence[Rendered], batch: Sequence[int]
) -> Iterator[Assisted]:
    reading.forget()
    helper.begin()
    going = [
        Search(
            rule=rule,
            index=index,
            ids=list(jobs[index].ids),
            response_start=jobs[index].response_start,
            num_given=len(jobs[index].ids),
        )
        for index in batch
    ]
    while going:
        logits_BV = reading.next_logits({search.index: tuple(search.ids) for search in going})
        finite = torch.isfinite(logits_BV.amax(dim=-1)).tolist()
        ranked = _ranked(logits_BV, rule.top_k)
        asks = []
        for search, is_finite, (candidates, log_probs) in zip(going, finite, ranked, strict=True):
            if not is_finite:
                reason = "the model's logits are not finite"
                yield Assisted(index=search.index, status="failed", reason=reason)
                continue
            asks.append((search, _ask(search, candidates, log_probs)))
        if not asks:
            return
        for (search, ask), passed in zip(asks, helper.harmful([ask for _, ask in asks]), strict=True):
            search.advance([token for token, is_passed in zip(ask.candidates, passed, strict=True) if is_passed])
            if search.ended_by:
                yield search.result()
        going = [search for search, _ in asks if not search.ended_by]


def _ask(search: Search, candidates: Sequence[int], log_probs: Sequence[float]) -> Ask:
    return Ask(
        index=search.index,
        ids=tuple(search.ids),
        response_start=search.response_start,
        num_written=len(search.ids) - search.num_given,
        candidates=tuple(candidates),
        log_probs=tuple(log_probs),
    )


def _ranked(logits_BV: Tensor, top_k: int) -> list[tuple[list[int], list[float]]]:
    """Each row's most probable tokens and their log-probabilities; equals by id, what the model rules out left out."""
    norms_B1 = logits_BV.logsumexp(dim=-1, keepdim=True).cpu().double()
    values_BK, ids_BK = torch.topk(logits_BV, min(top_k, logits_BV.shape[-1]), dim=-1)
    found = []
    for values, ids in zip((values_BK.cpu().double() - norms_B1).tolist(), ids_BK.tolist(), strict=True):
        pairs = sorted((-value, token) for value, token in zip(values, ids, strict=True) if value > float("-inf"))
        found.append(([token for _, token in pairs], [-value for value, _ in pairs]))
    return found
