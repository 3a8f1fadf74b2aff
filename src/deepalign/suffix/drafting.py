"""Probe sampling: a small draft model reads all candidates of a step, and the target only those worth reading.

After Zhao et al. 2024 (arXiv 2403.01251). The target reads a few candidates drawn at random, the draft all of them; how
well the two order those few alike decides how many more the target reads, the draft's best first: with agreement
a = (1 + Spearman's rho) / 2, (1 - a) of the candidates over a reduction factor. A draft that knows nothing costs its
time and no more: what is kept and told are the target's losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from deepalign.chat import conversation, render
from deepalign.generation import evaluation_mode
from deepalign.statistics import rank_correlation
from deepalign.suffix.behaviours import SEPARATOR, Behaviour, Ids, initial_ids, suffix_text
from deepalign.suffix.panel import Panel
from deepalign.suffix.settings import SearchSettings

PROBED, REDUCTION = 16, 8
"""One in so many candidates is a probe, and the factor of the publication's fastest setting."""
_LEAST_PROBES = 4


class Draft:
    """A smaller model with the same prompts and targets in its own ids.

    Args:
        model: A `transformers` causal LM; not changed.
        tokenizer: Its tokenizer.
        behaviours: The search's, made with that tokenizer and the draft's template, in the same order.
        fingerprint: Names its weights in the state of a search.
    """

    def __init__(self, model: Any, tokenizer: Any, behaviours: Sequence[Behaviour], fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._model, self._tokenizer, self._behaviours = model, tokenizer, tuple(behaviours)
        self._panel: Panel | None = None

    def losses(self, chosen: Sequence[int], texts: Sequence[str], near: str, settings: SearchSettings) -> list[float]:
        """Mean loss of each suffix over some behaviours; infinite where the draft cannot read it behind a prompt."""
        with evaluation_mode(self._model):
            if self._panel is None:
                first = initial_ids(self._tokenizer, self._behaviours, settings.suffix_tokens)
                self._panel = Panel(self._model, self._behaviours, settings, first)
            total = [0.0] * len(texts)
            for number in chosen:
                for place, loss in enumerate(self._losses(number, texts, near)):
                    total[place] += loss / len(chosen)
        return total

    def _losses(self, number: int, texts: Sequence[str], near: str) -> list[float]:
        assert self._panel is not None
        # The same text is of different lengths in different prompts' ids only where it merges with them.
        by_length: dict[int, list[int]] = {}
        ids = [self._ids(number, text) for text in texts]
        for place, own in enumerate(ids):
            if own:
                by_length.setdefault(len(own), []).append(place)
        found = [math.inf] * len(texts)
        start = self._ids(number, near)
        for places in by_length.values():
            candidates = [own for own in (ids[place] for place in places) if own]
            read = self._panel.read([number], candidates, start or candidates[0], screen=True)
            for place, loss in zip(places, read.losses_N.tolist(), strict=True):
                found[place] = loss
        return found

    def _ids(self, number: int, text: str) -> Ids | None:
        """The draft's ids of a suffix behind a prompt; None where they merge with what stands around them."""
        at = self._behaviours[number]
        messages = conversation(f"{at.text}{SEPARATOR}{text}", at.system_prompt)
        whole = render(self._tokenizer, at.template, messages, site=at.site).ids
        inner = whole[len(at.before_ids) : len(whole) - len(at.after_ids)]
        return inner if at.with_suffix(inner) == whole else None


def probes(count: int, generator: torch.Generator) -> list[int]:
    """Which candidates the target reads whatever the draft says."""
    return torch.randperm(count, generator=generator)[: max(_LEAST_PROBES, count // PROBED)].tolist()


def worth_reading(probed: Sequence[int], target: Sequence[float], draft: Sequence[float]) -> list[int]:
    """Which more candidates the target is to read, the draft's best first.

    Args:
        probed: Those that it has read.
        target: Its losses of them.
        draft: The draft's losses of all.
    """
    pairs = [(one, draft[place]) for place, one in zip(probed, target, strict=True)]
    finite = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
    rho = rank_correlation(*zip(*finite, strict=True)) if len(finite) > 1 else None
    agreement = (1.0 + (rho or 0.0)) / 2.0
    count = max(1, int((1.0 - agreement) * len(draft) / REDUCTION))
    order = sorted((place for place, loss in enumerate(draft) if math.isfinite(loss)), key=lambda place: draft[place])
    known = set(probed)
    return [place for place in order[:count] if place not in known]


def texts_of(tokenizer: Any, at: Behaviour, candidates: Sequence[Ids]) -> list[str]:
    """What candidates of the target say."""
    return [suffix_text(tokenizer, at, ids) for ids in candidates]
