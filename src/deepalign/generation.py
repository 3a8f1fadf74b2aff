"""Token ids in, token ids out: many jobs through one model, in batches, each row with its own random stream.

Knows nothing of prompts, templates, attacks or judges. Three habits make it fast on any decoder: a job whose ids are
a prefix of another's shares that one's keys and values; what a row adds to them is written in place; and finished rows
leave the batch. Sampling needs no sort of the vocabulary. A row's draws come from its own seed, so that
no row depends on its batch, its neighbours or where a run was interrupted (up to the rounding of low precision).
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepalign.batching import Continuation, Job, Row, batches, is_out_of_memory, most_rows, with_hosts
from deepalign.caching import can_share_prefixes, takes_batches
from deepalign.decoding import Decoding, shares_attention
from deepalign.graphs import GraphedDecoding, can_record
from deepalign.packing import PackedProducts, packed_products
from deepalign.sharing import NotShared

__all__ = ["Continuation", "Job", "generate"]

logger = logging.getLogger("deepalign")
_SUCCEEDED: weakref.WeakKeyDictionary[Any, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def generate(
    model: Any,
    jobs: Sequence[Job],
    *,
    stop_ids: Sequence[int],
    max_batch: int | None = None,
    with_logprobs: bool = False,
) -> Iterator[Continuation]:
    """Continue every job; yields in the order in which rows finish, each job exactly once.

    A job that does not fit the model's context, runs out of memory even alone, or meets non-finite logits yields
    `status="failed"` with the reason.

    Args:
        model: A `transformers` causal LM; not changed.
        jobs: What to continue; `ids` must not be empty.
        stop_ids: Ids that end a row.
        max_batch: Most rows at a time, default what the device is fast with; memory may allow fewer.
        with_logprobs: Whether continuations carry the log-probabilities of their ids.
    """
    fitting = []
    for index, job in enumerate(jobs):
        problem = _too_long(model, job)
        if problem:
            yield Continuation(index=index, status="failed", reason=problem)
        else:
            fitting.append(index)
    rows = with_hosts(jobs, fitting)
    with evaluation_mode(model):
        most = most_rows(model, max_batch) if takes_batches(model.config) else 1
        way = _way(model, rows, most, with_logprobs=with_logprobs)
        longest = max((len(row.host) + row.job.sampling.max_new_tokens for row in rows), default=0)
        held_once = way.shared and can_share_prefixes(model.config, longest)
        for batch in batches(model, rows, most, shared=held_once):
            way = yield from _generate_or_split(model, batch, frozenset(stop_ids), way)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How batches are written."""

    shared: bool
    """Rows share their prefixes' keys and values."""
    recorded: bool
    """Steps are recorded as graphs; only with shared prefixes."""
    products: PackedProducts | None
    """Weights laid out beforehand."""
    with_logprobs: bool


def _way(model: Any, rows: Sequence[Row], max_batch: int, *, with_logprobs: bool) -> Way:
    """The fastest way that the model takes part in."""
    some_ids = max((row.host for row in rows), key=len, default=())
    shared = len(rows) > 1 and _found(model, shares_attention, some_ids)
    most_new = max((row.job.sampling.max_new_tokens for row in rows), default=0)
    num_batches = math.ceil(len(rows) / max_batch)
    return Way(
        shared=shared,
        recorded=shared and _found(model, can_record, some_ids),
        products=packed_products(model, rows=min(len(rows), max_batch), steps=num_batches * most_new),
        with_logprobs=with_logprobs,
    )


def _found(model: Any, trial: Callable[[Any, Sequence[int]], bool], ids: Sequence[int]) -> bool:
    """The outcome of a trial; one that succeeded is not repeated while the model runs in the same form."""
    config = model.config.get_text_config(decoder=True)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    attention = getattr(config, "_attn_implementation", None)
    form = (trial, str(model.dtype), str(model.device), attention, hooks)
    known = _SUCCEEDED.setdefault(model, set())
    if form not in known and trial(model, ids):
        known.add(form)
    return form in known


def _too_long(model: Any, job: Job) -> str:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = len(job.ids) + job.sampling.max_new_tokens
    if limit is not None and needed > limit:
        return f"{len(job.ids)} input + {job.sampling.max_new_tokens} new tokens exceed the model's {limit}"
    return ""


def _generate_or_split(
    model: Any, batch: list[Row], stop_ids: frozenset[int], way: Way
) -> Generator[Continuation, None, Way]:
    """One batch to its end; what memory does not hold in halves. Returns the way to write the next one."""
    finished: set[int] = set()
    try:
        for continuation in _written(model, batch, stop_ids, way):
            finished.add(continuation.index)
            yield continuation
        return way
    except NotShared as error:
        logger.warning("%s does not share prefixes after all (%s); going on without", type(model).__name__, error)
        parts, way = [batch], replace(way, shared=False, recorded=False)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rest = [row for row in batch if row.index not in finished]
        if len(rest) == 1:
            yield Continuation(index=rest[0].index, status="failed", reason="out of memory, even alone")
            return way
        logger.warning("out of memory with %d rows; going on with half", len(rest))
        parts = [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for part in parts:
        left = [row for row in part if row.index not in finished]
        way = yield from _generate_or_split(model, left, stop_ids, way)
    return way


def _written(model: Any, batch: list[Row], stop_ids: frozenset[int], way: Way) -> Iterator[Continuation]:
    # A frame of its own: when it fails, its keys and values are gone before the next try.
    decoding = (
        GraphedDecoding(model, batch, stop_ids=stop_ids)
        if way.recorded
        else Decoding(model, batch, stop_ids=stop_ids, shared=way.shared, products=way.products)
    )
    if way.with_logprobs:
        decoding.note_logprobs()
    while decoding.unfinished:
        yield from decoding.step()


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off for the time of a generation, and give the model back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
