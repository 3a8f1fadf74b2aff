"""Loss of one behaviour's target behind each of many candidate suffixes.

The loss is the mean cross-entropy of the target's tokens, or their mellowmax. What candidates have in common with the
suffix that they were made from, up to the first position that they change, is read once for all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepalign.batching import in_halves
from deepalign.suffix.behaviours import Behaviour, Ids
from deepalign.suffix.reading import Prefix, Reader

# Shape suffixes: N = candidates, B = rows of a batch, T = target tokens.
_CPU_POSITIONS = 1024
"""Positions of one pass on a CPU: more do not make it faster."""
_CUDA_SHARE = 0.4
_LIVE_STATES = 32
"""Hidden states that one position of a pass may hold at a time, on a GPU."""
_PASS_COST = 64
"""What a pass costs beside its rows on a CPU, in positions: fewer, larger passes are taken where they cost less."""
_LAUNCHING, _RATE = 1.25e-3, 4e14
"""On a GPU: seconds of a layer's launches, and operations per second, as an H100 had them with 1B and 7B models."""


@dataclass(frozen=True, slots=True)
class Score:
    """One suffix, read exactly."""

    loss: float
    nats: tuple[float, ...]
    """Cross-entropy of each target token."""
    matched: bool
    """Whether greedy decoding gives the whole target."""


@dataclass(frozen=True, slots=True)
class Readings:
    """Many candidates, read together."""

    losses_N: Tensor
    """float64 on the CPU; infinite where the model gave no finite number, or memory did not hold even one row."""
    matched_N: Tensor
    """Whether greedy decoding gives the whole target."""


class TargetLosses:
    """Losses of one behaviour's target.

    Args:
        reader: How to read the model.
        behaviour: The prompt and its target.
        mellowmax: Alpha of the mellowmax over the target's tokens; None for the mean.
        shared: Whether candidates share what they have in common with the suffix given to `near`.
        hold: Whether to keep the prompt's keys and values between steps.
    """

    def __init__(
        self,
        reader: Reader,
        behaviour: Behaviour,
        *,
        mellowmax: float | None = None,
        shared: bool = True,
        hold: bool = True,
    ) -> None:
        self.behaviour = behaviour
        self.reader = reader
        self._mellowmax = mellowmax
        self._shared = shared
        self._hold = hold
        self._before: Prefix | None = None
        self._near: tuple[Ids, Prefix | None] = ((), None)
        self._most_rows = 2**20
        self._pass_cost = _pass_cost(reader)
        self._targets_T = torch.tensor(behaviour.target_ids, device=reader.device)

    def before(self) -> Prefix | None:
        """Keys and values of what comes before the suffix; None where they cannot be shared."""
        if self._before is None:
            prefix = self.reader.prefix(self.behaviour.before_ids)
            if not self._hold:
                return prefix
            self._before = prefix
        return self._before

    def near(self, suffix: Ids) -> None:
        """Read the suffix that the next candidates are made from, for what they share with it."""
        if self._shared and self.reader.cached and self._near[0] != suffix:
            self._near = suffix, self.reader.prefix(suffix, self.before())

    def forget(self) -> None:
        """Let go of what `near` read."""
        self._near = (), None

    def of(self, candidates: Sequence[Ids]) -> Readings:
        """Read every candidate."""
        near, prefix = self._near
        if prefix is None:
            near, prefix = (), self.before()
        known = len(self.behaviour.before_ids)
        order = sorted(range(len(candidates)), key=lambda index: -_alike(candidates[index], near))
        alike = [_alike(candidates[index], near) for index in order]
        tail = len(self.behaviour.after_ids) + len(self.behaviour.target_ids) - 1
        lengths = [len(candidates[index]) - count + tail for index, count in zip(order, alike, strict=True)]
        losses_N = torch.full((len(candidates),), math.inf, dtype=torch.float64)
        matched_N = torch.zeros(len(candidates), dtype=torch.bool)
        for first, last in passes(tuple(lengths), *self._limits(max(lengths, default=0), prefix), self._pass_cost):
            part = order[first:last]
            shared = known + alike[last - 1] if prefix is not None else 0
            read = self._read_in_memory([candidates[row] for row in part], prefix, shared)
            losses_N[part] = torch.tensor([loss for loss, _ in read], dtype=torch.float64)
            matched_N[part] = torch.tensor([matched for _, matched in read])
        return Readings(losses_N, matched_N)

    def score(self, suffix: Ids) -> Score:
        """One suffix, read by itself."""
        prefix = self.before()
        nats_1T, hits_1T = self._nats([suffix], prefix, prefix.length if prefix is not None else 0)
        loss = float(reduced(nats_1T, self._mellowmax)[0])
        return Score(loss, tuple(nats_1T[0].tolist()), bool(hits_1T.all()))

    def _limits(self, longest: int, prefix: Prefix | None) -> tuple[int, int]:
        """Most positions and most rows of a pass."""
        if self.reader.device.type != "cuda":
            return _CPU_POSITIONS, self._most_rows
        config = self.reader.model.config.get_text_config(decoder=True)
        activations = _LIVE_STATES * int(config.hidden_size) * int(self.reader.model.dtype.itemsize)
        keys = prefix.bytes_per_position * (prefix.length + longest) if prefix is not None else 0
        free = torch.cuda.mem_get_info(self.reader.device)[0] * _CUDA_SHARE
        return 2**30, max(1, min(self._most_rows, int(free // (keys + activations * longest))))

    def _read_in_memory(self, rows: Sequence[Ids], prefix: Prefix | None, known: int) -> list[tuple[float, bool]]:
        """One pass; in parts where memory does not hold it, and later passes no larger than what it held."""
        largest = 0

        def work(part: Sequence[Ids]) -> list[tuple[float, bool]]:
            nonlocal largest
            nats_BT, hits_BT = self._nats(part, prefix, known)
            largest = max(largest, len(part))
            pairs = zip(reduced(nats_BT, self._mellowmax).tolist(), hits_BT.all(dim=-1).tolist(), strict=True)
            return [(loss, matched) if math.isfinite(loss) else (math.inf, False) for loss, matched in pairs]

        read = in_halves(work, rows, lambda _: (math.inf, False))
        if largest < len(rows):
            self._most_rows = max(1, largest)
        return read

    @torch.inference_mode()
    def _nats(self, rows: Sequence[Ids], prefix: Prefix | None, known: int) -> tuple[Tensor, Tensor]:
        num_targets = len(self._targets_T)
        return self.reader.target_logits(self._inputs(rows, known), num_targets, prefix, known).cross_entropies(
            self._targets_T
        )

    def _inputs(self, rows: Sequence[Ids], known: int) -> Tensor:
        target = self.behaviour.target_ids[:-1]
        whole = [(self.behaviour.with_suffix(tuple(row)) + target)[known:] for row in rows]
        return torch.tensor(whole, device=self.reader.device)


def _pass_cost(reader: Reader) -> int:
    """What a pass costs beside its rows, in positions; from sizes alone, so that a search goes the same way again."""
    if reader.device.type != "cuda":
        return _PASS_COST
    layers = int(reader.model.config.get_text_config(decoder=True).num_hidden_layers)
    operations = 2 * sum(parameter.numel() for parameter in reader.model.parameters())
    return int(layers * _LAUNCHING * _RATE / max(1, operations))


def reduced(nats_BT: Tensor, mellowmax: float | None) -> Tensor:
    """One loss for each row: the mean over tokens, or (log mean exp(alpha x)) / alpha, which leans to the worst."""
    if mellowmax is None:
        return nats_BT.mean(dim=-1)
    return ((mellowmax * nats_BT).logsumexp(dim=-1) - math.log(nats_BT.shape[-1])) / mellowmax


@functools.lru_cache(maxsize=64)
def passes(
    lengths: tuple[int, ...], most_positions: int, most_rows: int, pass_cost: int = _PASS_COST
) -> tuple[tuple[int, int], ...]:
    """Cut rows, the shortest first, into passes [first, last) that cost least; each row is as long as its pass's last.

    Args:
        lengths: Positions that each row needs, ascending.
        most_positions: Most positions of a pass; a single row may have more.
        most_rows: Most rows of a pass.
        pass_cost: What a pass costs beside its rows, in positions.
    """
    costs, starts = [0], [0]
    for last in range(1, len(lengths) + 1):
        length = lengths[last - 1]
        most = max(1, min(most_rows, most_positions // max(1, length)))
        cost, start = min(
            (costs[first] + pass_cost + (last - first) * length, first) for first in range(max(0, last - most), last)
        )
        costs.append(cost)
        starts.append(start)
    found = []
    last = len(lengths)
    while last > 0:
        found.append((starts[last], last))
        last = starts[last]
    return tuple(reversed(found))


def _alike(one: Ids, other: Ids) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
