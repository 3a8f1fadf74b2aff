"""Decoding steps as CUDA graphs: a step's kernels are recorded once and launched as one.

A decoding step of a large model is hundreds of small kernels, and launching them one by one from Python takes longer
than they run. Recorded, nothing may change its shape or its place: own tokens go into a fixed room whose unused columns
are masked out, the place of the next one is counted on the device, and a row that has ended keeps its lane, unread,
until enough have ended to lay out and record anew. What a step computes is what `Decoding` computes; whether a model
can be recorded, and writes the same, is found out by trying it (`decoding.writes_alike`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign.batching import Row
from deepalign.decoding import Decoding, run_model, writes_alike
from deepalign.sharing import NotShared, SharedCache

logger = logging.getLogger("deepalign")

# Shape suffixes: L = lanes, V = vocabulary, S = columns of the prefixes, N = room for own tokens.
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device; the result does it again."""
_ROOM = 64
"""Own tokens for which there is room at first; more is added, and recorded anew, when it is used up."""
_LEAST_ALIVE = 0.7
"""Share of lanes in use under which the rest are laid out anew."""


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Record work that has run before as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def can_record(model: Any, ids: Sequence[int]) -> bool:
    """Whether a model's steps can be recorded on its device, and write the same; tried on a few ids.

    Args:
        model: A `transformers` causal LM in evaluation mode, of which `decoding.shares_attention` is true.
        ids: Some ids of its vocabulary.
    """
    if len({parameter.device for parameter in model.parameters()}) != 1 or model.device.type != "cuda":
        return False
    failed = False

    def record(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal failed
        try:
            return recorded(work)
        except RuntimeError:
            failed = True
            raise

    # Steps that are recorded, one with an empty lane, a layout anew, and one that is recorded after it.
    steps = ((0, 1, 2, 3), (0, 2, 3), (0, 1, 2), (1, 2), (0, 1), (0,))
    alike = writes_alike(
        model, ids, lambda rows: GraphedDecoding(model, rows, stop_ids=frozenset(), record=record), steps
    )
    return alike and not failed


class GraphedDecoding(Decoding):
    """A batch whose steps keep their shapes, so that they can be recorded.

    Args:
        model: A `transformers` causal LM in evaluation mode.
        batch: Rows to write.
        stop_ids: Ids that end a row.
        record: How a step is recorded.

    Raises:
        NotShared: The rows cannot share their prefixes in this model.
    """

    def __init__(
        self, model: Any, batch: Sequence[Row], *, stop_ids: frozenset[int], record: Record = recorded
    ) -> None:
        super().__init__(model, batch, stop_ids=stop_ids, shared=True)
        if not isinstance(self._cache, SharedCache):
            raise NotShared("nothing is shared")
        self._record: Record | None = record
        self._lanes = list(range(len(batch)))
        self._room = self._used = 0
        self._column_1 = torch.zeros(1, dtype=torch.long, device=self._device)
        hidden = torch.finfo(model.dtype).min
        self._seen_L11N = torch.zeros(self._mask_BT.shape, dtype=model.dtype, device=self._device)
        self._seen_L11N = self._seen_L11N.masked_fill(self._mask_BT == 0, hidden)[:, None, None]
        self._num_prefix = int(self._mask_BT.shape[1])
        self._logits_LV: Tensor | None = None
        self._again: Callable[[], None] | None = None
        self._warm = False

    def logits(self) -> Tensor:
        """Feed the last id of each row; logits of the next, [B, V] in float32."""
        if self._used == self._room:
            self._widen()
        if self._again is None and self._warm and self._record is not None:
            try:
                self._again = self._record(self._pass)
            except RuntimeError as error:
                logger.warning("a step cannot be recorded (%s); going on without", str(error).splitlines()[0])
                self._record = None
        if self._again is None:
            # The first step of a layout runs as it is: libraries set themselves up in it, which no recording may hold.
            self._pass()
            self._warm = True
        else:
            self._again()
        self._used += 1
        assert self._logits_LV is not None
        return self._logits_LV if self._in_order else self._logits_LV[self._lanes_B]

    @property
    def _lanes_B(self) -> Tensor:
        return torch.tensor(self._lanes, dtype=torch.long, device=self._device)

    @property
    def _in_order(self) -> bool:
        return len(self._lanes) == self._ids_B1.shape[0]

    def _pass(self) -> None:
        """One step; reads and changes tensors only in their places."""
        self._seen_L11N.index_fill_(3, self._column_1 + self._num_prefix, 0.0)
        with self._attention():
            output = run_model(
                self._model,
                self._cache,
                input_ids=self._ids_B1,
                attention_mask=self._seen_L11N,
                position_ids=self._positions_B1,
            )
        self._logits_LV = output.logits[:, -1].float()
        self._column_1 += 1
        self._positions_B1 += 1

    def _widen(self) -> None:
        self._forget()
        self._room += _ROOM
        added = self._seen_L11N.new_full((*self._seen_L11N.shape[:3], _ROOM), torch.finfo(self._seen_L11N.dtype).min)
        self._seen_L11N = torch.cat([self._seen_L11N, added], dim=-1)
        self._cache.fix(self._room, self._column_1)

    def _forget(self) -> None:
        """Let go of a recording, whose tensors are about to be replaced."""
        self._again = self._logits_LV = None
        self._warm = False

    def drop_states(self, keep: list[int], index: Tensor) -> None:
        """Let go of the lanes of rows that have ended, all at once when they are many."""
        self._lanes = [self._lanes[number] for number in keep]
        if not self._lanes or len(self._lanes) > _LEAST_ALIVE * self._ids_B1.shape[0]:
            return
        self._forget()
        lanes = self._lanes_B
        self._cache.keep(lanes)
        self._seen_L11N, self._ids_B1 = self._seen_L11N[lanes], self._ids_B1[lanes]
        self._positions_B1 = self._positions_B1[lanes]
        self._lanes = list(range(len(self._lanes)))

    def feed(self, tokens: list[int]) -> None:
        """Set the next id of every row, in its place."""
        fed_B1 = torch.tensor(tokens, dtype=torch.long, device=self._device).unsqueeze(-1)
        if self._in_order:
            self._ids_B1.copy_(fed_B1)
        else:
            self._ids_B1[self._lanes_B] = fed_B1
