"""Per-position KL divergence between two models on the same answers (paper section 2.2, Figs. 1 and 4).

Both models read the same ids: prompt and reference answer. At response position t (0-based) the full next-token
distributions are compared, in both directions, in float32 and a slice of the vocabulary at a time, so that no [T, V]
tensor of two models is ever held. Knows nothing of prompts' meaning or of judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepalign.batching import in_halves
from deepalign.chat import Rendered
from deepalign.errors import UserError
from deepalign.generation import evaluation_mode
from deepalign.heads import VOCABULARY_SLICE, LogitSource, logit_reader, padded, predicting, slices

# Shape suffixes: N = response positions of one batch.


@dataclass(frozen=True, kw_only=True, slots=True)
class KlProfile:
    """KL at each response position of one prompt, in nats; NaN-free: a non-finite value is None."""

    prompt_id: str
    forward: tuple[float | None, ...]
    """D(model || base), the paper's direction."""
    reverse: tuple[float | None, ...]
    """D(base || model)."""


def check_vocabularies(model: Any, base: Any) -> int:
    """Number of vocabulary entries that two models share as their whole output.

    Rows that neither tokenizer names (padding of the embedding matrix) may differ in number and are left out.

    Raises:
        UserError: A token id means different things to the two.
    """
    ours, theirs = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        raise UserError(
            f"{model.name} and {base.name} have different vocabularies ({len(ours)} and {len(theirs)} tokens; "
            f"{len(odd)} entries differ, such as {odd[0][0]!r}): KL between them has no meaning; "
            "choose the base that this model was trained from, or leave out the kl probe"
        )
    named = int(max(ours.values())) + 1
    if model.vocab_size == base.vocab_size:
        return int(model.vocab_size)
    return min(named, int(model.vocab_size), int(base.vocab_size))


def kl_profiles(
    model: Any, base: Any, items: Sequence[tuple[str, Rendered]], *, vocab_size: int, max_positions: int, batch: int = 8
) -> Iterator[KlProfile]:
    """KL at each response position, for each (prompt_id, rendered prompt and answer).

    Args:
        model: The aligned model, a `transformers` causal LM.
        base: What it is compared with; same vocabulary.
        items: Conversations whose response is the answer.
        vocab_size: Entries to compare, from `check_vocabularies`.
        max_positions: Positions of each response to look at, from the first.
        batch: Sequences in one forward pass; fewer where memory runs out. One that does not fit alone is all None.
    """
    kept = [(name, *_clip(rendered, max_positions)) for name, rendered in items]
    kept = sorted((item for item in kept if item[2] > 0), key=lambda item: -len(item[1]))
    if not kept:
        return
    with evaluation_mode(model), evaluation_mode(base):
        with torch.inference_mode():
            probe = kept[0][1][:16]
            our_reader, their_reader = logit_reader(model, probe), logit_reader(base, probe)

        def measured(part: Sequence[tuple[str, tuple[int, ...], int]]) -> list[KlProfile]:
            sequences, counts = [ids for _, ids, _ in part], [count for _, _, count in part]
            with torch.inference_mode():
                picks = predicting(sequences, counts)
                ours = our_reader(padded(model, sequences), picks)
                theirs = their_reader(padded(base, sequences), picks)
                forward_N, reverse_N = kl_by_slices(ours, theirs, vocab_size)
            sides = zip(torch.split(forward_N.cpu(), counts), torch.split(reverse_N.cpu(), counts), strict=True)
            return [
                KlProfile(prompt_id=name, forward=_finite(one), reverse=_finite(other))
                for (name, _, _), (one, other) in zip(part, sides, strict=True)
            ]

        def unknown(item: tuple[str, tuple[int, ...], int]) -> KlProfile:
            return KlProfile(prompt_id=item[0], forward=(None,) * item[2], reverse=(None,) * item[2])

        for start in range(0, len(kept), batch):
            yield from in_halves(measured, kept[start : start + batch], unknown)


def kl_by_slices(
    ours: LogitSource, theirs: LogitSource, vocab_size: int, slice_size: int = VOCABULARY_SLICE
) -> tuple[Tensor, Tensor]:
    """D(p || q) and D(q || p), each [N] in float64, from two logit sources, each read once.

    With a, b the logits and A, B the logarithms of their normalisers, D(p || q) = sum of p (a - b) - A + B: both sums
    are kept up as in an online softmax while the slices come, in float64 from slice to slice. An entry that both models
    rule out (-inf in both) adds nothing; one that only one rules out makes that direction infinite, as it should be.
    """
    sums_p, sums_q = _OnlineSums(), _OnlineSums()
    for bound in slices(vocab_size, slice_size):
        ours_NC, theirs_NC = ours(*bound), theirs(*bound)
        ratio_NC = ours_NC - theirs_NC
        ruled_out = not bool(torch.isfinite(ratio_NC.sum()))
        # What a model rules out has no weight in its sum, whatever the ratio; looked for only where there is any.
        sums_p.add(ours_NC, torch.where(ours_NC == -torch.inf, 0.0, ratio_NC) if ruled_out else ratio_NC)
        sums_q.add(theirs_NC, torch.where(theirs_NC == -torch.inf, 0.0, ratio_NC) if ruled_out else ratio_NC)
    norm_p_N, mean_p_N = sums_p.result()
    norm_q_N, mean_q_N = sums_q.result()
    return mean_p_N - norm_p_N + norm_q_N, norm_p_N - norm_q_N - mean_q_N


class _OnlineSums:
    """Logarithm of a softmax's normaliser, and the mean of values under it, kept up over slices of the logits."""

    def __init__(self) -> None:
        self._top_N: Tensor | None = None
        self._total_N: Tensor
        self._weighted_N: Tensor

    def add(self, logits_NC: Tensor, values_NC: Tensor) -> None:
        """Take in one slice."""
        # A slice that a model rules out as a whole weighs nothing, rather than being no number.
        top_N = logits_NC.amax(dim=-1).clamp(min=torch.finfo(logits_NC.dtype).min)
        if self._top_N is None:
            self._top_N = top_N
            self._total_N = torch.zeros_like(top_N, dtype=torch.float64)
            self._weighted_N = torch.zeros_like(self._total_N)
        higher_N = torch.maximum(self._top_N, top_N)
        fade_N = (self._top_N - higher_N).double().exp()
        weights_NC = (logits_NC - higher_N.unsqueeze(-1)).exp_()
        self._total_N = self._total_N * fade_N + weights_NC.sum(dim=-1).double()
        self._weighted_N = self._weighted_N * fade_N + weights_NC.mul_(values_NC).sum(dim=-1).double()
        self._top_N = higher_N

    def result(self) -> tuple[Tensor, Tensor]:
        """The logarithm of the normaliser and the mean, each [N] in float64."""
        assert self._top_N is not None
        return self._top_N.double() + self._total_N.log(), self._weighted_N / self._total_N


def _clip(rendered: Rendered, max_positions: int) -> tuple[tuple[int, ...], int]:
    """Ids up to the last position looked at, and how many response positions they hold."""
    count = min(max_positions, len(rendered.ids) - rendered.response_start)
    return rendered.ids[: rendered.response_start + count], count


def _finite(values: Tensor) -> tuple[float | None, ...]:
    return tuple(float(value) if bool(torch.isfinite(value)) else None for value in values)
