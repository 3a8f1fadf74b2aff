"""The onset probe's two steps: how this model opens its refusals, and how probable that is along harmful answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from deepalign.chat import answer_ids
from deepalign.models import LoadedModel
from deepalign.onset import OnsetProfile, Openings, onset_profiles
from deepalign.progress import Progress, silent
from deepalign.records import Prompt, Site
from deepalign.runs import RunFolder
from deepalign.workflows.along import AlongAnswers, Forced
from deepalign.workflows.models import greedy_rulings

ONSET = "onset.jsonl"
_PROMPTS = 32
_PATH_TOKENS = 3


def own_openings(loaded: LoadedModel, prompts: Sequence[Prompt], system_prompt: str | None) -> list[list[int]]:
    """First tokens of the refusals that a model itself gives, greedily, to some of the prompts.

    Only openings that at least two refusals share: one alone may be the beginning of anything.

    Returns:
        Token paths, most frequent first.
    """
    few = tuple(prompts[:: max(1, len(prompts) // _PROMPTS)][:_PROMPTS])
    found = Counter(
        tuple(ids[:_PATH_TOKENS])
        for ids, ruling in greedy_rulings(loaded, few, system_prompt)
        if ruling.outcome == "refused_at_once" and len(ids) >= _PATH_TOKENS
    )
    return [list(path) for path, count in found.most_common() if count > 1]


def measure_onset(
    run: RunFolder,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    own: Sequence[Sequence[int]],
    system_prompt: str | None,
    max_positions: int,
    site: Site = "raw",
    progress: Progress = silent,
) -> list[OnsetProfile]:
    """Onset profiles of every prompt with an answer, those that are missing appended."""
    openings = Openings.of(lambda text: answer_ids(loaded.tokenizer, text), [tuple(path) for path in own])

    def measured(items: Sequence[Forced]) -> Iterator[OnsetProfile]:
        return onset_profiles(loaded.model, items, openings, vocab_size=loaded.vocab_size, max_positions=max_positions)

    items = AlongAnswers(loaded, prompts, system_prompt, max_positions, site)
    return items.profiles(run, ONSET, OnsetProfile, measured, stage="refusal onset", progress=progress)
