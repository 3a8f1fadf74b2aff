"""What generation takes and gives, and which rows go through the model together.

Rows of like length and those that share a prefix, and no more than memory holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from deepalign.records import Message, Sampling

logger = logging.getLogger("deepalign")
Item = TypeVar("Item")
Result = TypeVar("Result")
_CPU_CACHE_BYTES = 3 * 2**30
_MOST_ROWS, _MOST_ROWS_ON_GPU = 160, 640


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One sequence to continue."""

    ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    num_prefill: int = 0
    """How many of the last ids the assistant is made to have written; jobs that differ only in them belong together."""
    messages: tuple[Message, ...] = ()
    """The conversation before them, for engines that take no ids."""


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
    logprobs: tuple[float, ...] = ()
    """Natural log-probability of each id before temperature and cuts; empty if not asked for."""
    note: str = ""
    """What is not exact about the ids, where an engine gave no ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A job with its place in the given list and the row whose forward pass it shares."""

    index: int
    job: Job
    host: tuple[int, ...]


def with_hosts(jobs: Sequence[Job], fitting: Sequence[int]) -> list[Row]:
    """The jobs at `fitting`, each with the longest of them that it begins: the one whose forward pass it shares."""
    order = sorted(fitting, key=lambda index: jobs[index].ids)
    rows: list[Row] = []
    host: tuple[int, ...] = ()
    for index in reversed(order):
        ids = jobs[index].ids
        if host[: len(ids)] != ids:
            host = ids
        rows.append(Row(index=index, job=jobs[index], host=host))
    return rows


def most_rows(model: Any, max_batch: int | None) -> int:
    """Most rows of a batch: what was asked for, or with how many the device is fast."""
    if max_batch is not None:
        return max_batch
    return _MOST_ROWS_ON_GPU if torch.device(model.device).type == "cuda" else _MOST_ROWS


def batches(model: Any, rows: list[Row], max_batch: int, *, shared: bool) -> Iterator[list[Row]]:
    """Rows of like length together, hosts kept whole where they fit, within the memory for keys and values.

    Args:
        model: Whose memory and sizes count.
        rows: What to lay out.
        max_batch: Most rows of a batch.
        shared: Whether a host's keys and values are held once, not by each of its rows.
    """
    budget = _cache_budget(model) // max(1, _bytes_per_token(model))
    ordered = sorted(rows, key=lambda row: (len(row.host), row.host, len(row.job.ids)))
    # As few batches as there must be, and those alike: a small one takes as many steps as a full one.
    max_batch = math.ceil(len(rows) / max(1, math.ceil(len(rows) / max_batch)))
    batch: list[Row] = []
    hosts: set[tuple[int, ...]] = set()
    longest = newest = 0
    for row in ordered:
        longest, newest = max(longest, len(row.host)), max(newest, row.job.sampling.max_new_tokens)
        num_hosts = len(hosts) + (row.host not in hosts) if shared else len(batch) + 1
        if batch and (len(batch) >= max_batch or num_hosts * longest + (len(batch) + 1) * newest > budget):
            yield batch
            batch, hosts = [], set()
            longest, newest = len(row.host), row.job.sampling.max_new_tokens
        batch.append(row)
        hosts.add(row.host)
    if batch:
        yield batch


def _bytes_per_token(model: Any) -> int:
    # Layers may differ in width (Gemma 4), so each has a configuration of its own.
    width = sum(_key_width(layer) for layer in model.config.get_text_config(decoder=True).per_layer_config)
    # Twice over: while a batch is laid out, the shared pass and the rows' own buffers are both alive.
    return 2 * 2 * width * int(model.dtype.itemsize)


def _key_width(layer_config: Any) -> int:
    num_heads = int(getattr(layer_config, "num_attention_heads", 1) or 1)
    heads = getattr(layer_config, "num_key_value_heads", None) or num_heads
    width = getattr(layer_config, "head_dim", None) or int(layer_config.hidden_size) // num_heads
    return int(heads) * int(width)


def _cache_budget(model: Any) -> int:
    device = torch.device(model.device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.6)
    return _CPU_CACHE_BYTES


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text


def in_halves(
    work: Callable[[Sequence[Item]], list[Result]], part: Sequence[Item], hopeless: Callable[[Item], Result]
) -> list[Result]:
    """Work on a batch; where memory does not hold it, on its halves.

    Args:
        work: What to do with a batch; one result for each item, in order.
        part: The batch.
        hopeless: The result for an item that does not fit even alone.
    """
    try:
        return work(part)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(part) == 1:
        logger.warning("out of memory with a single sequence; it is left out")
        return [hopeless(part[0])]
    logger.warning("out of memory with %d sequences; going on with half", len(part))
    middle = len(part) // 2
    return in_halves(work, part[:middle], hopeless) + in_halves(work, part[middle:], hopeless)
