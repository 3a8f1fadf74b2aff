"""Next-token probabilities along answers, and after branches that leave them: many at once where attention allows it.

A branch stands in place of an answer's tokens from some place on and sees only what came before it. Branches of a whole
batch are read in one pass over the keys and values that the answers left, each told by a mask what it may see. Models
whose attention cannot be told so (recurrent ones, windows that fill) are found out by comparing, and get their branches
as plain sequences. Knows nothing of refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deepalign.caching import can_share_prefixes, empty_cache
from deepalign.heads import Reader, chosen_probabilities, padded, predicting

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A branch: tokens put in place of an answer's from `place` on."""

    row: int
    place: int
    path: Path
    reach: float
    """Probability of going this way."""
    parent: int = -1
    """Number of the node before it among those read so far."""


class Answers(Protocol):
    """A batch of answers, and of beginnings put in their place."""

    def next_tokens(self, counts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Probabilities of `tokens` at the last `counts[i]` positions of each sequence: [sum of counts, tokens]."""

    def after(self, nodes: Sequence[Node], followers: Sequence[int]) -> torch.Tensor:
        """Probabilities of the followers after each node: [nodes, followers]; parents have been read before."""


class Apart:
    """Every beginning as a plain sequence of its own: right for any model."""

    def __init__(self, model: Any, reader: Reader, vocab_size: int, sequences: Sequence[tuple[int, ...]]) -> None:
        self._model, self._reader, self._vocab_size = model, reader, vocab_size
        self._sequences = sequences

    def next_tokens(self, counts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """As `Answers` says."""
        source = self._reader(padded(self._model, self._sequences), predicting(self._sequences, counts))
        return chosen_probabilities(source, self._vocab_size, tokens)

    def after(self, nodes: Sequence[Node], followers: Sequence[int]) -> torch.Tensor:
        """As `Answers` says."""
        rows = [(*self._sequences[node.row][: node.place], *node.path) for node in nodes]
        found = []
        # No more at a time than there are answers, so that a batch that was halved for memory is halved here too.
        size = len(self._sequences)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            source = self._reader(padded(self._model, part), [slice(len(row) - 1, len(row)) for row in part])
            found.append(chosen_probabilities(source, self._vocab_size, followers))
        return torch.cat(found)


class Together:
    """All beginnings of a batch in one pass for each depth, over the keys and values that the answers left."""

    def __init__(self, model: Any, reader: Reader, vocab_size: int, sequences: Sequence[tuple[int, ...]]) -> None:
        self._model, self._reader, self._vocab_size = model, reader, vocab_size
        self._sequences = sequences
        self._device = torch.device(model.device)
        self._cache = empty_cache(model.config)
        self._width = max(len(ids) for ids in sequences)
        self._sees: list[torch.Tensor] = []
        """For each node read so far, the columns that it saw and its own."""

    def next_tokens(self, counts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """As `Answers` says."""
        inputs = {**padded(self._model, self._sequences), "past_key_values": self._cache}
        source = self._reader(inputs, predicting(self._sequences, counts))
        return chosen_probabilities(source, self._vocab_size, tokens)

    def after(self, nodes: Sequence[Node], followers: Sequence[int]) -> torch.Tensor:
        """As `Answers` says."""
        slot_of, filled = [], [0] * len(self._sequences)
        for node in nodes:
            slot_of.append(filled[node.row])
            filled[node.row] += 1
        shape = (len(self._sequences), max(filled))
        ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        sees = torch.zeros(*shape, self._width + shape[1], dtype=torch.bool)
        # A place that no node fills sees itself, for attention over nothing is no number.
        sees[:, :, self._width :] = torch.eye(shape[1], dtype=torch.bool)
        for node, slot in zip(nodes, slot_of, strict=True):
            ids[node.row, slot] = node.path[-1]
            positions[node.row, slot] = node.place + len(node.path) - 1
            if node.parent < 0:
                sees[node.row, slot, : node.place] = True
            else:
                seen = self._sees[node.parent]
                sees[node.row, slot, : len(seen)] = seen
        self._sees += [sees[node.row, slot] for node, slot in zip(nodes, slot_of, strict=True)]
        self._width += shape[1]
        dtype = self._model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        inputs = {
            "input_ids": ids.to(self._device),
            "attention_mask": mask.unsqueeze(1).to(self._device),
            "position_ids": positions.to(self._device),
            "past_key_values": self._cache,
        }
        picks = [torch.arange(count, device=self._device) for count in filled]
        chances = chosen_probabilities(self._reader(inputs, picks), self._vocab_size, followers)
        # The source's rows stand sequence after sequence; the nodes may not.
        starts = [sum(filled[:row]) for row in range(len(filled))]
        return chances[[starts[node.row] + slot for node, slot in zip(nodes, slot_of, strict=True)]]


def reads_together(
    model: Any, reader: Reader, vocab_size: int, *, ids: tuple[int, ...], paths: Sequence[Path], longest: int
) -> bool:
    """Whether a model's attention can be told what each token sees: tried on a few branches, and compared.

    Args:
        model: A `transformers` causal LM.
        reader: Of its logits.
        vocab_size: Width of its output.
        ids: A sequence to try it on.
        paths: Branches to try, of two tokens or more.
        longest: Most columns, answers and branches together, that will ever be read.
    """
    if not can_share_prefixes(model.config, longest):
        return False
    ids = ids[:48]
    firsts = sorted({path[0] for path in paths})
    level = [Node(0, place, path[:1], 1.0) for place in (len(ids) // 2 + 1, len(ids)) for path in paths]
    next_level = [Node(0, node.place, (*node.path, node.path[0]), 1.0, parent=n) for n, node in enumerate(level)]
    found = []
    for kind in (Apart, Together):
        answers = kind(model, reader, vocab_size, [ids])
        try:
            answers.next_tokens([1], [0])
            found.append(torch.cat([answers.after(nodes, firsts) for nodes in (level, next_level)]))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            # Passes without position ids or a common cache, or that want a mask of another form.
            if kind is Apart:
                raise
            return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.03
    return bool((found[0] - found[1]).abs().max() <= tolerance)
