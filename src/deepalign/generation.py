"""Token ids in, token ids out: many jobs through one model, in batches, each row with its own random stream.

Knows nothing of prompts, templates, attacks or judges. Three habits make it fast on any decoder: a job whose ids are
a prefix of another's shares that one's forward pass; keys and values live in buffers that are written in place; and
finished rows leave the batch. Sampling needs no sort of the vocabulary. A row's draws come from its own seed, so that
no row depends on its batch, its neighbours or where a run was interrupted (up to the rounding of low precision).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepalign.batching import Job, Row, batches, with_hosts
from deepalign.caching import can_share_prefixes, empty_cache, is_filled, keep_rows, row_cache, takes_batches
from deepalign.errors import UserError, first_line
from deepalign.sampling import draw

__all__ = ["Continuation", "Job", "generate"]

logger = logging.getLogger("deepalign")


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What came after a job's ids."""

    index: int
    """Position of the job in the list that was given."""
    status: Literal["ok", "failed"]
    token_ids: tuple[int, ...] = ()
    """The ids that were written, without the stop token."""
    finish: Literal["stop", "length", ""] = ""
    reason: str = ""


def generate(
    model: Any, jobs: Sequence[Job], *, stop_ids: Sequence[int], max_batch: int = 160
) -> Iterator[Continuation]:
    """Continue every job; yields in the order in which rows finish, each job exactly once.

    A job that does not fit the model's context, runs out of memory even alone, or meets non-finite logits yields
    `status="failed"` with the reason.

    Args:
        model: A `transformers` causal LM; not changed.
        jobs: What to continue; `ids` must not be empty.
        stop_ids: Ids that end a row.
        max_batch: Most rows at a time; memory may allow fewer.
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
        for batch in batches(model, rows, max_batch if takes_batches(model.config) else 1):
            yield from _generate_or_split(model, batch, frozenset(stop_ids))


def _too_long(model: Any, job: Job) -> str:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = len(job.ids) + job.sampling.max_new_tokens
    if limit is not None and needed > limit:
        return f"{len(job.ids)} input + {job.sampling.max_new_tokens} new tokens exceed the model's {limit}"
    return ""


def _generate_or_split(model: Any, batch: list[Row], stop_ids: frozenset[int]) -> Iterator[Continuation]:
    finished: set[int] = set()
    try:
        for continuation in _generate_batch(model, batch, stop_ids):
            finished.add(continuation.index)
            yield continuation
        return
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rest = [row for row in batch if row.index not in finished]
    if len(rest) == 1:
        yield Continuation(index=rest[0].index, status="failed", reason="out of memory, even alone")
        return
    logger.warning("out of memory with %d rows; going on with half", len(rest))
    half = len(rest) // 2
    yield from _generate_or_split(model, rest[:half], stop_ids)
    yield from _generate_or_split(model, rest[half:], stop_ids)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text


def _generate_batch(model: Any, batch: list[Row], stop_ids: frozenset[int]) -> Iterator[Continuation]:
    """Continue one batch to its end, row by row as they finish.

    Each row's last id is fed by the first decoding step, so the shared pass needs no logits at all.
    """
    lengths = [len(row.job.ids) - 1 for row in batch]
    num_new = max(row.job.sampling.max_new_tokens for row in batch)
    cache, width = _prefilled_cache(model, batch, lengths, num_new)
    decoding = _Decoding(model, batch, lengths, width, cache, num_new, stop_ids)
    while decoding.unfinished:
        yield from decoding.step()


@torch.inference_mode()
def _prefilled_cache(model: Any, batch: list[Row], lengths: list[int], num_new: int) -> tuple[Any, int]:
    """Keys and values of all but each row's last id, right-aligned; returns the cache and its width."""
    total = max(len(row.host) for row in batch) + num_new
    if not can_share_prefixes(model.config, total):
        sequences = [row.job.ids[:-1] for row in batch]
        return _forward(model, sequences), max(lengths)
    hosts = list(dict.fromkeys(row.host for row in batch))
    shared = _forward(model, [host[:-1] for host in hosts])
    place = {host: number for number, host in enumerate(hosts)}
    sources = [place[row.host] for row in batch]
    starts = [max(len(host) for host in hosts) - len(row.host) for row in batch]
    return row_cache(model.config, shared, sources, starts, lengths, num_new + 1), max(lengths)


def _forward(model: Any, sequences: list[tuple[int, ...]]) -> Any:
    """One left-padded pass that only fills a cache."""
    cache = empty_cache(model.config)
    width = max(len(ids) for ids in sequences)
    if width == 0:
        return cache
    device = torch.device(model.device)
    ids_BT = torch.tensor([(0,) * (width - len(ids)) + ids for ids in sequences], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
    # One position through the head is the least that `transformers` lets a causal LM compute.
    _run(model, cache, input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, logits_to_keep=1)
    return cache


def _run(model: Any, cache: Any, **inputs: Any) -> Any:
    """One forward pass that reads and extends the cache.

    Raises:
        UserError: The model cannot work with `transformers`' common cache, or passes it by.
    """
    try:
        output = model(**inputs, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{type(model).__name__} cannot be generated with here: {first_line(error)}") from error
    if not is_filled(cache):
        reason = "it keeps its state outside transformers' DynamicCache"
        raise UserError(f"{type(model).__name__} cannot be generated with here: {reason}")
    return output


class _Decoding:
    """The state of one batch while it is written token by token."""

    def __init__(
        self,
        model: Any,
        batch: list[Row],
        lengths: list[int],
        width: int,
        cache: Any,
        num_new: int,
        stop_ids: frozenset[int],
    ) -> None:
        self._model = model
        self._device = torch.device(model.device)
        self._rows = list(batch)
        self._cache = cache
        self._steps = 0
        self._stop_ids = stop_ids
        self._written: list[list[int]] = [[] for _ in batch]
        self._ids_B1 = torch.tensor([[row.job.ids[-1]] for row in batch], device=self._device)
        mask = [[0] * (width - length) + [1] * length for length in lengths]
        self._mask_BT = torch.tensor(mask, dtype=torch.long, device=self._device).reshape(len(batch), width)
        self._positions_B1 = torch.tensor([[length] for length in lengths], device=self._device)
        streams = [np.random.Generator(np.random.Philox(key=row.job.seed)).random(num_new) for row in batch]
        self._uniforms_BN = torch.tensor(np.stack(streams), dtype=torch.float64, device=self._device)

    @property
    def unfinished(self) -> bool:
        """Whether any row still goes on."""
        return len(self._rows) > 0

    # The mode is entered for one step at a time: held across the yields of a generator, it would reach the caller.
    @torch.inference_mode()
    def step(self) -> list[Continuation]:
        """Write one token in every row; the rows that this ends."""
        logits_BV = self._logits()
        finite_B = torch.isfinite(logits_BV.amax(dim=-1)).tolist()
        samplings = [row.job.sampling for row in self._rows]
        tokens = draw(logits_BV, samplings, self._uniforms_BN[:, self._steps]).tolist()
        self._steps += 1
        ended: list[Continuation] = []
        keep = []
        for number, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            continuation = self._advance(number, row, int(token), finite_B[number])
            if continuation is None:
                keep.append(number)
            else:
                ended.append(continuation)
        self._retain(keep, [tokens[number] for number in keep])
        return ended

    def _logits(self) -> Tensor:
        """Feed the last id of each row; logits of the next, [B, V] in float32."""
        ones_B1 = torch.ones_like(self._ids_B1)
        self._mask_BT = torch.cat([self._mask_BT, ones_B1], dim=-1)
        output = _run(
            self._model,
            self._cache,
            input_ids=self._ids_B1,
            attention_mask=self._mask_BT,
            position_ids=self._positions_B1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def _advance(self, number: int, row: Row, token: int, finite: bool) -> Continuation | None:
        """Take a row's new token; its continuation when that ends it."""
        written = self._written[number]
        if not finite:
            return Continuation(index=row.index, status="failed", reason="the model's logits are not finite")
        if token in self._stop_ids:
            return Continuation(index=row.index, status="ok", token_ids=tuple(written), finish="stop")
        written.append(token)
        if len(written) >= row.job.sampling.max_new_tokens:
            return Continuation(index=row.index, status="ok", token_ids=tuple(written), finish="length")
        return None

    def _retain(self, keep: list[int], tokens: list[int]) -> None:
        """Keep only the rows that go on, and set their next ids."""
        if len(keep) < len(self._rows):
            index = torch.tensor(keep, dtype=torch.long, device=self._device)
            keep_rows(self._cache, index)
            self._mask_BT = self._mask_BT[index]
            self._positions_B1 = self._positions_B1[index]
            self._uniforms_BN = self._uniforms_BN[index]
            self._rows = [self._rows[number] for number in keep]
            self._written = [self._written[number] for number in keep]
        self._ids_B1 = torch.tensor(tokens, dtype=torch.long, device=self._device).unsqueeze(-1)
        self._positions_B1 = self._positions_B1 + 1


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
