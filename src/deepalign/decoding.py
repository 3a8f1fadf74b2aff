"""One batch of rows while it is written token by token: its keys and values, its draws, its ends.

Keys and values come from one pass over each distinct prefix. Where the model's attention can be made to look at them
there (`shares_attention`), rows share them for good; else each row gets its own copy, or, where not even those can be
cut out of a shared pass, a pass of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepalign.batching import Continuation, Job, Row, with_hosts
from deepalign.caching import can_share_prefixes, empty_cache, is_filled, keep_rows, row_cache
from deepalign.errors import UserError, first_line
from deepalign.packing import PackedProducts
from deepalign.records import Sampling
from deepalign.sampling import draw
from deepalign.sharing import NotShared, SharedAttention, SharedCache, aligned

_PROBE_IDS = 12
_PROBE_STEPS = ((0, 2, 3), (1, 2), (0,))


class Decoding:
    """The state of one batch.

    Args:
        model: A `transformers` causal LM in evaluation mode.
        batch: Rows to write.
        stop_ids: Ids that end a row.
        shared: Whether to try rows that share their prefixes' keys and values; ask `shares_attention` first.
        products: The model's weights laid out for decoding steps, where that pays.

    Raises:
        NotShared: From `step`, with `shared`; the rows that have not ended may be begun anew without.
        UserError: The model cannot be generated with at all.
    """

    def __init__(
        self,
        model: Any,
        batch: Sequence[Row],
        *,
        stop_ids: frozenset[int],
        shared: bool,
        products: PackedProducts | None = None,
    ) -> None:
        lengths = [len(row.job.ids) - 1 for row in batch]
        num_new = max(row.job.sampling.max_new_tokens for row in batch)
        self._model = model
        self._products = products
        self._device = torch.device(model.device)
        self._rows = list(batch)
        self._cache, mask = _prefilled(model, batch, lengths, num_new, shared=shared)
        self._steps = 0
        self._stop_ids = stop_ids
        self._written: list[list[int]] = [[] for _ in batch]
        self._logprobs: list[list[float]] | None = None
        self._ids_B1 = torch.tensor([[row.job.ids[-1]] for row in batch], device=self._device)
        self._mask_BT = torch.tensor(mask, dtype=torch.long, device=self._device).reshape(len(batch), -1)
        self._positions_B1 = torch.tensor([[length] for length in lengths], device=self._device)
        streams = [np.random.Generator(np.random.Philox(key=row.job.seed)).random(num_new) for row in batch]
        self._uniforms_BN = torch.tensor(np.stack(streams), dtype=torch.float64, device=self._device)

    @property
    def unfinished(self) -> bool:
        """Whether any row still goes on."""
        return len(self._rows) > 0

    def note_logprobs(self) -> None:
        """Have continuations carry the log-probabilities of their ids; before the first step."""
        self._logprobs = [[] for _ in self._rows]

    # The mode is entered for one step at a time: held across the yields of a generator, it would reach the caller.
    @torch.inference_mode()
    def step(self) -> list[Continuation]:
        """Write one token in every row; the rows that this ends."""
        logits_BV = self.logits()
        finite_B = torch.isfinite(logits_BV.amax(dim=-1)).tolist()
        samplings = [row.job.sampling for row in self._rows]
        tokens = draw(logits_BV, samplings, self._uniforms_BN[:, self._steps]).tolist()
        self._steps += 1
        if self._logprobs is not None:
            chosen_B1 = torch.tensor(tokens, device=logits_BV.device).unsqueeze(-1)
            logps_B = (logits_BV.gather(-1, chosen_B1).squeeze(-1) - logits_BV.logsumexp(dim=-1)).tolist()
            for noted, logp in zip(self._logprobs, logps_B, strict=True):
                noted.append(logp)
        ended: list[Continuation] = []
        keep = []
        for number, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            continuation = self._advance(number, row, int(token), finite_B[number])
            if continuation is None:
                keep.append(number)
            else:
                ended.append(continuation)
        self.retain(keep, [tokens[number] for number in keep])
        return ended

    def logits(self) -> Tensor:
        """Feed the last id of each row; logits of the next, [B, V] in float32."""
        ones_B1 = torch.ones_like(self._ids_B1)
        self._mask_BT = torch.cat([self._mask_BT, ones_B1], dim=-1)
        with self._products or contextlib.nullcontext(), self._attention():
            output = run_model(
                self._model,
                self._cache,
                input_ids=self._ids_B1,
                attention_mask=self._mask_BT,
                position_ids=self._positions_B1,
            )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """What stands in for the model's attention during a pass."""
        return SharedAttention(self._cache) if isinstance(self._cache, SharedCache) else contextlib.nullcontext()

    def _advance(self, number: int, row: Row, token: int, finite: bool) -> Continuation | None:
        """Take a row's new token; its continuation when that ends it."""
        written = self._written[number]
        if not finite:
            return Continuation(index=row.index, status="failed", reason="the model's logits are not finite")
        finish: Literal["stop", "length", ""] = "stop" if token in self._stop_ids else ""
        if not finish:
            written.append(token)
            finish = "length" if len(written) >= row.job.sampling.max_new_tokens else ""
        if finish:
            logprobs = tuple(self._logprobs[number][: len(written)]) if self._logprobs is not None else ()
            ids = tuple(written)
            return Continuation(index=row.index, status="ok", token_ids=ids, finish=finish, logprobs=logprobs)
        return None

    def retain(self, keep: list[int], tokens: list[int]) -> None:
        """Keep only the rows that go on, and set their next ids."""
        if len(keep) < len(self._rows):
            index = torch.tensor(keep, dtype=torch.long, device=self._device)
            self.drop_states(keep, index)
            self._uniforms_BN = self._uniforms_BN[index]
            self._rows = [self._rows[number] for number in keep]
            self._written = [self._written[number] for number in keep]
            if self._logprobs is not None:
                self._logprobs = [self._logprobs[number] for number in keep]
        self.feed(tokens)

    def drop_states(self, keep: list[int], index: Tensor) -> None:
        """Let go of what the model remembers of all rows but those at `index`."""
        if isinstance(self._cache, SharedCache):
            self._cache.keep(index)
        else:
            keep_rows(self._cache, index)
        self._mask_BT = self._mask_BT[index]
        self._positions_B1 = self._positions_B1[index]

    def feed(self, tokens: list[int]) -> None:
        """Set the next id of every row."""
        self._ids_B1 = torch.tensor(tokens, dtype=torch.long, device=self._device).unsqueeze(-1)
        self._positions_B1 = self._positions_B1 + 1


@torch.inference_mode()
def _prefilled(
    model: Any, batch: Sequence[Row], lengths: list[int], num_new: int, *, shared: bool
) -> tuple[Any, list[list[int]]]:
    """Keys and values of all but each row's last id, with the mask that says which columns a row sees."""
    width = max(lengths)
    right_aligned = [[0] * (width - length) + [1] * length for length in lengths]
    if not can_share_prefixes(model.config, max(len(row.host) for row in batch) + num_new):
        return _forward(model, [row.job.ids[:-1] for row in batch]), right_aligned
    hosts = list(dict.fromkeys(row.host for row in batch))
    passed = _forward(model, [host[:-1] for host in hosts])
    sources = [hosts.index(row.host) for row in batch]
    longest = max(len(host) for host in hosts)
    starts = [longest - len(row.host) for row in batch]
    if shared and longest > 1:
        columns = aligned(longest - 1)
        return SharedCache(passed, sources, columns), [
            [0] * start + [1] * length + [0] * (columns - start - length)
            for start, length in zip(starts, lengths, strict=True)
        ]
    return row_cache(model.config, passed, sources, starts, lengths, num_new + 1), right_aligned


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
    run_model(model, cache, input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, logits_to_keep=1)
    return cache


def run_model(model: Any, cache: Any, **inputs: Any) -> Any:
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


@torch.inference_mode()
def shares_attention(model: Any, ids: Sequence[int]) -> bool:
    """Whether a model writes the same over shared prefixes as over rows of their own; tried on a few ids.

    Args:
        model: A `transformers` causal LM in evaluation mode.
        ids: Some ids of its vocabulary; fewer than four share nothing worth while.
    """
    return writes_alike(model, ids, lambda rows: Decoding(model, rows, stop_ids=frozenset(), shared=True))


@torch.inference_mode()
def writes_alike(
    model: Any,
    ids: Sequence[int],
    make: Callable[[list[Row]], Decoding],
    steps: Sequence[Sequence[int]] = _PROBE_STEPS,
) -> bool:
    """Whether a way of decoding gives a model's own logits, up to rounding; tried on a few ids.

    Args:
        model: A `transformers` causal LM in evaluation mode.
        ids: Some ids of its vocabulary; fewer than four are no trial.
        make: The way, given a batch.
        steps: Rows of four that go on after each step.
    """
    few = tuple(ids[:_PROBE_IDS])
    if len(few) < 4 or not can_share_prefixes(model.config, len(few) + len(steps)):
        return False
    greedy = Sampling(temperature=0.0, max_new_tokens=len(steps))
    # Two prefixes of different length, one with two rows that end in different places.
    jobs = [Job(ids=part, sampling=greedy, seed=0) for part in (few, few[: len(few) // 2], few[1:], few[:1] + few[2:])]
    rows = with_hosts(jobs, range(len(jobs)))
    own: list[Tensor] = []
    found: list[Tensor] = []
    try:
        for logits, decoding in (
            (own, Decoding(model, rows, stop_ids=frozenset(), shared=False)),
            (found, make(rows)),
        ):
            for kept in steps:
                logits.append(decoding.logits().clone())
                # The same ids on both sides, whatever rounding makes of the greedy ones.
                tokens = own[len(logits) - 1].argmax(dim=-1).tolist()
                decoding.retain(list(kept), [tokens[row] for row in kept])
    except (NotShared, RuntimeError, UserError):
        return False
    # In low precision every order of sums gives other logits; only a difference of form must count.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    return all(_distance(one, other) <= tolerance for one, other in zip(own, found, strict=True))


def _distance(expected_BV: Tensor, found_BV: Tensor) -> float:
    """Largest distance of a row's logits, in their own spread; not finite where they are not."""
    spread_B = (expected_BV - expected_BV.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((expected_BV - found_BV).norm(dim=-1) / spread_B).max())
