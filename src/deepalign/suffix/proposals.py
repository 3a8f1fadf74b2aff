"""Candidates for the next suffix, from the gradient; none is ever proposed twice in a search.

Draws come from a generator of their own that is seeded by the search's seed and the step, so that a step's draws depend
on nothing before it. Knows nothing of losses.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign.suffix.behaviours import Ids
from deepalign.suffix.settings import Order

# Shape suffixes: L = suffix positions, V = vocabulary, K = the tokens drawn from at each position.
_DIGEST_BYTES = 8
_ROUNDS = 8


class Seen:
    """Which suffixes a search has come across, as 64-bit digests."""

    def __init__(self, packed: bytes = b"") -> None:
        self._order = bytearray(packed)
        self._known = {packed[at : at + _DIGEST_BYTES] for at in range(0, len(packed), _DIGEST_BYTES)}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, ids: Ids) -> bool:
        return _digest(ids) in self._known

    def add(self, ids: Ids) -> None:
        """Take note of a suffix."""
        digest = _digest(ids)
        if digest not in self._known:
            self._known.add(digest)
            self._order += digest

    def forget(self, suffixes: Iterable[Ids], *, since: int) -> None:
        """Take no note of suffixes after all, of those that came after the first `since`."""
        gone = {_digest(ids) for ids in suffixes}
        start = since * _DIGEST_BYTES
        tail = [bytes(self._order[at : at + _DIGEST_BYTES]) for at in range(start, len(self._order), _DIGEST_BYTES)]
        self._order[start:] = b"".join(digest for digest in tail if digest not in gone)
        self._known.difference_update(gone.intersection(tail))

    @property
    def packed(self) -> bytes:
        """All digests, in the order in which they came."""
        return bytes(self._order)


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def allowed_tokens(tokenizer: Any, vocab_size: int, *, allow_non_ascii: bool) -> Tensor:
    """Which ids a suffix may hold, [V]: those with a text that can be printed, and no control tokens."""
    known = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    fit = [
        len(text) > 0 and "\ufffd" not in text and text.isprintable() and (allow_non_ascii or text.isascii())
        for text in texts
    ]
    allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
    allowed_V[:known] = torch.tensor(fit)
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    allowed_V[[token for token in control if token < vocab_size]] = False
    return allowed_V


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.blake2b(f"{seed}\x1f{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draws(
    suffix: Ids,
    scores_LV: Tensor,
    allowed_V: Tensor,
    generator: torch.Generator,
    *,
    topk: int,
    n_replace: int,
    order: Order,
    batch: int,
) -> Iterator[list[Ids]]:
    """Batches of candidates, the same suffix with some tokens replaced; known ones and repetitions among them.

    Args:
        suffix: What candidates are made from.
        scores_LV: How the loss would change with each token at each position, to first order.
        allowed_V: Which tokens may be put in.
        generator: Of the draws.
        topk: Tokens drawn from at each position, the most promising ones.
        n_replace: Positions that each candidate changes.
        order: Whether to draw, or to go through the replacements from the most promising one on.
        batch: Candidates of a batch; the last of an ordered list may have fewer.
    """
    blocked_LV = scores_LV.masked_fill(~allowed_V, torch.inf)
    here_L = torch.tensor(suffix)
    # A token in place of itself is no change.
    blocked_LV[torch.arange(len(suffix)), here_L] = torch.inf
    width = min(topk, int(torch.isfinite(blocked_LV).sum(dim=-1).min()))
    if width == 0:
        return
    values_LK, tokens_LK = blocked_LV.topk(width, dim=-1, largest=False)
    if order == "greedy":
        gains_LK = values_LK - scores_LV[torch.arange(len(suffix)), here_L].unsqueeze(1)
        ranked = torch.split(gains_LK.flatten().argsort(stable=True), batch)
        for part in ranked if n_replace == 1 else ():
            yield [_replaced(suffix, [index // width], [int(tokens_LK.view(-1)[index])]) for index in part.tolist()]
        if n_replace == 1:
            return
    n_replace = min(n_replace, len(suffix))
    for _ in range(_ROUNDS):
        places = _places(len(suffix), batch, n_replace, generator)
        ranks = torch.randint(0, width, (batch, n_replace), generator=generator)
        tokens = tokens_LK[places, ranks]
        yield [_replaced(suffix, at, new) for at, new in zip(places.tolist(), tokens.tolist(), strict=True)]


def merged(suffix: Ids, best: Sequence[Ids]) -> list[Ids]:
    """The changes that the best candidates make to a suffix, put together: of the first two, the first three, ...

    Where two change the same position, the better one, which comes first, is followed.
    """
    changes: dict[int, int] = {}
    found = []
    for number, candidate in enumerate(best):
        for place, (new, old) in enumerate(zip(candidate, suffix, strict=True)):
            if new != old:
                changes.setdefault(place, new)
        if number:
            found.append(tuple(changes.get(place, old) for place, old in enumerate(suffix)))
    return found


def _places(length: int, count: int, n_replace: int, generator: torch.Generator) -> Tensor:
    """Positions to change, [count, n_replace]; single ones spread evenly over the suffix."""
    if n_replace > 1:
        return torch.rand(count, length, generator=generator).argsort(dim=-1)[:, :n_replace]
    rounds = [torch.randperm(length, generator=generator) for _ in range(-(-count // length))]
    return torch.cat(rounds)[:count].unsqueeze(1)


def _replaced(suffix: Ids, places: Sequence[int], tokens: Sequence[int]) -> Ids:
    ids = list(suffix)
    for place, token in zip(places, tokens, strict=True):
        ids[place] = token
    return tuple(ids)
