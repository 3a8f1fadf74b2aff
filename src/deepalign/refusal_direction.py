"""Which of the candidate directions is the refusal direction: the one whose removal leaves least refusal.

After Arditi et al. 2024 (arXiv 2406.11717, App. C): each candidate is taken out of the model in turn, and its effect
looked at on prompts that the means did not see. What may leave this module for a file are the facts about a direction,
never the direction. Knows nothing of judges or of where prompts come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepalign.abliteration import Activations, Ids, ablated, candidate_directions
from deepalign.batching import in_halves
from deepalign.branches import Answers, Apart, Node, Together, reads_together
from deepalign.depth import kl_by_slices
from deepalign.errors import UserError
from deepalign.generation import evaluation_mode
from deepalign.heads import LogitSource, logit_reader, padded, slices
from deepalign.onset import Openings, follow_openings
from deepalign.progress import Progress, silent

# Shape suffixes: L = layers, P = last positions of a prompt, H = hidden width, N = prompts, V = vocabulary.
MAX_KL = 0.1
"""Nats on harmless prompts; the paper's bound."""
_KEPT_LAYERS = 0.8
"""Share of the layers, from the first, that candidates come from; the paper's."""
_LEAST_MASS = 0.005
"""Less probable beginnings of an opening are not followed, and count as refusals, as nearly all are in first place."""
_SCREENING, _GROUP, _MOST_GROUPS = 4, 12, 3
"""Held-out prompts of a kind on which all candidates are screened; how many of the best are then tried on all of them
at a time, and how many times."""
Place = tuple[int, int]
"""Layer and position of a candidate, both from 0."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of taking one candidate out."""

    refusal: float
    kl: float
    place: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionFacts:
    """What may be written of a direction."""

    layer: int
    """Whose input it was found in, from 0."""
    position: int
    """Of the prompt's tokens, from the end: -1 is the last."""
    num_layers: int
    num_candidates: int
    num_tried: int
    """Those whose KL was measured on all held-out prompts."""
    num_harmful: int
    """Prompts in the mean; those held out are counted apart."""
    num_harmless: int
    num_harmful_held_out: int
    num_harmless_held_out: int
    num_left_out: int
    refusal_before: float
    """Mean probability of a refusal opening at the first response position, on held-out harmful prompts."""
    refusal_after: float
    kl: float
    """Mean D(model || ablated) there on held-out harmless prompts, nats."""
    max_kl: float | None
    """None where there was no limit."""
    within_kl: bool
    """False where none that was tried kept to `max_kl`, and the one with the least sum of refusal and KL was taken."""
    cosine_mean: float | None
    """Of the direction with those of the other layers at its position; None where there are none."""
    cosine_least: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """A direction of the residual stream; kept in memory only."""

    vector_H: Tensor
    """Unit length, float32, on the CPU."""
    facts: DirectionFacts


def select_direction(
    model: Any,
    harmful: Activations,
    harmless: Activations,
    held_out: tuple[Sequence[Ids], Sequence[Ids]],
    openings: Openings,
    *,
    vocab_size: int,
    max_kl: float = MAX_KL,
    batch: int = 16,
    progress: Progress = silent,
) -> Direction:
    """The candidate that leaves the least refusal, among those that change harmless prompts by at most `max_kl`.

    Args:
        model: The model that the activations are of.
        harmful: Its mean activations on harmful prompts.
        harmless: And on harmless ones.
        held_out: Rendered prompts that are in neither mean, harmful and harmless.
        openings: What counts as the beginning of a refusal.
        vocab_size: Width of the model's output.
        max_kl: Nats, at the first response position; infinite for no limit.
        batch: Sequences in one forward pass; fewer where memory runs out.
        progress: Told of the candidates tried.

    Raises:
        UserError: The two means are the same everywhere, or no ablation gave finite numbers.
    """
    directions_LPH = candidate_directions(harmful, harmless)
    num_layers, num_positions = directions_LPH.shape[:2]
    # Of two layers the first has no candidates, for there all prompts are alike.
    layers = range(max(min(2, num_layers), int(_KEPT_LAYERS * num_layers)))
    places = [(n, p) for n in layers for p in range(num_positions) if bool(torch.isfinite(directions_LPH[n, p]).all())]
    with evaluation_mode(model), torch.inference_mode():
        effects = _Effects(model, *held_out, openings, vocab_size, batch)
        tried = _tried(model, directions_LPH, places, effects, max_kl, progress)
    if not tried:
        raise UserError("harmful and harmless prompts leave no direction to take out; give other or more prompts")
    fits = tried[-1].kl <= max_kl
    trial = tried[-1] if fits else min(tried, key=lambda one: (one.refusal + one.kl, one.place))
    best = trial.place
    vector_H = directions_LPH[best].clone()
    cosines = [float(directions_LPH[place] @ vector_H) for place in places if place[1] == best[1] and place != best]
    facts = DirectionFacts(
        layer=best[0],
        position=best[1] - num_positions,
        num_layers=num_layers,
        num_candidates=len(places),
        num_tried=len(tried),
        num_harmful=harmful.num_sequences,
        num_harmless=harmless.num_sequences,
        num_harmful_held_out=len(held_out[0]),
        num_harmless_held_out=len(held_out[1]),
        num_left_out=harmful.num_left_out + harmless.num_left_out,
        refusal_before=effects.refusal_before,
        refusal_after=trial.refusal,
        kl=trial.kl,
        max_kl=None if math.isinf(max_kl) else max_kl,
        within_kl=fits,
        cosine_mean=sum(cosines) / len(cosines) if cosines else None,
        cosine_least=min(cosines, default=None),
    )
    return Direction(vector_H=vector_H, facts=facts)


def _tried(
    model: Any,
    directions_LPH: Tensor,
    places: Sequence[Place],
    effects: _Effects,
    max_kl: float,
    progress: Progress,
) -> list[_Trial]:
    """Effects of candidates, the most promising first, up to one that keeps to the bound.

    All are screened on a few prompts; in groups, from the best that seem to keep to it, some are then tried on all.
    """
    screened: list[tuple[bool, float, Place]] = []
    for count, place in enumerate(places, start=1):
        with ablated(model, directions_LPH[place]):
            refusal, kl = effects.refusal(_SCREENING), effects.kl(_SCREENING)
        if math.isfinite(refusal):
            screened.append((not kl <= max_kl, refusal, place))
        progress("refusal direction", count, len(places))
    order = [place for _, _, place in sorted(screened)]
    tried: list[_Trial] = []
    for first in range(0, min(len(order), _MOST_GROUPS * _GROUP), _GROUP):
        group: list[tuple[float, Place]] = []
        for place in order[first : first + _GROUP]:
            with ablated(model, directions_LPH[place]):
                group.append((effects.refusal(), place))
        for refusal, place in sorted(one for one in group if math.isfinite(one[0])):
            with ablated(model, directions_LPH[place]):
                kl = effects.kl()
            if not math.isfinite(kl):
                continue
            tried.append(_Trial(refusal, kl, place))
            if kl <= max_kl:
                return tried
    return tried


class _Effects:
    """What held-out prompts say of the model as it is at the moment: its refusals, and its distance from before."""

    def __init__(
        self,
        model: Any,
        harmful: Sequence[Ids],
        harmless: Sequence[Ids],
        openings: Openings,
        vocab_size: int,
        batch: int,
    ) -> None:
        self._model, self._openings, self._vocab_size, self._batch = model, openings, vocab_size, batch
        # A response id at the end, behind which nothing looks.
        self._harmful, self._harmless = [(*ids, 0) for ids in harmful], list(enumerate(harmless))
        longest = max(self._harmful, key=len)
        self._reader = logit_reader(model, longest[:16])
        paths = [path for path in sorted(openings.paths) if len(path) > 1][:4]
        columns = len(longest) + sum(len(openings.nodes_under(first)) for first in openings.first_tokens)
        together = not paths or reads_together(
            model, self._reader, vocab_size, ids=longest, paths=paths, longest=columns
        )
        self._kind: type[Together] | type[Apart] = Together if together else Apart
        self._before: list[Tensor] = self._over(self._harmless, self._logits, torch.full((vocab_size,), torch.nan))
        self.refusal_before = self.refusal()

    def refusal(self, most: int | None = None) -> float:
        """Mean probability of a refusal opening at the first response position, on the first `most` prompts or all."""

        def chances(part: Sequence[Ids]) -> list[float]:
            return _opening_chances(self._kind(self._model, self._reader, self._vocab_size, part), part, self._openings)

        return _mean(self._over(self._harmful[:most], chances, math.nan))

    def kl(self, most: int | None = None) -> float:
        """Mean D(before || now) at the first response position, nats, on the first `most` prompts or all."""

        def divergences(part: Sequence[tuple[int, Ids]]) -> list[float]:
            source = self._source(part)
            before_NV = torch.stack([self._before[number] for number, _ in part]).to(source(0, 1).device)
            forward_N, _ = kl_by_slices(lambda first, last: before_NV[:, first:last], source, self._vocab_size)
            return [float(value) for value in forward_N]

        return _mean(self._over(self._harmless[:most], divergences, math.nan))

    def _logits(self, part: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        source = self._source(part)
        return list(torch.cat([source(*bound) for bound in slices(self._vocab_size)], dim=-1).cpu())

    def _source(self, part: Sequence[tuple[int, Ids]]) -> LogitSource:
        sequences = [ids for _, ids in part]
        return self._reader(padded(self._model, sequences), [slice(len(ids) - 1, len(ids)) for ids in sequences])

    def _over(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]], hopeless: Any) -> list[Any]:
        parts = [items[start : start + self._batch] for start in range(0, len(items), self._batch)]
        return [one for part in parts for one in in_halves(work, part, lambda _: hopeless)]


def _opening_chances(answers: Answers, sequences: Sequence[Ids], openings: Openings) -> list[float]:
    """Probability of a refusal opening in place of each sequence's last id, read a token deeper each time."""
    firsts = openings.first_tokens
    masses = answers.next_tokens([1] * len(sequences), firsts).tolist()
    found = [0.0] * len(sequences)

    def goes_on(node: Node) -> bool:
        # Not "mass < least", which no number that is none fulfils: it must show in the sum.
        if node.path in openings.paths or not node.reach >= _LEAST_MASS:
            found[node.row] += node.reach
            return False
        return True

    begun = [
        Node(row, len(ids) - 1, (first,), mass)
        for row, (ids, chances) in enumerate(zip(sequences, masses, strict=True))
        for first, mass in zip(firsts, chances, strict=True)
    ]
    follow_openings(answers, [node for node in begun if goes_on(node)], openings, goes_on)
    return found


def _mean(values: Sequence[float]) -> float:
    """Over those that are numbers; not a number where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
