"""Harmful-token depth as a step of a run: reference answers -> rank profiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepalign.chat import answer_ids
from deepalign.depth import check_vocabularies
from deepalign.models import LoadedModel
from deepalign.onset import Openings
from deepalign.progress import Progress, silent
from deepalign.ranks import RankProfile, rank_profiles
from deepalign.records import Prompt, Site
from deepalign.runs import RunFolder
from deepalign.workflows.along import AlongAnswers, Forced

RANKS = "ranks.jsonl"


def worded_openings(loaded: LoadedModel, own: Sequence[Sequence[int]]) -> Openings:
    """The openings of refusals, each from its first token that is more than white space.

    A line break begins a refusal no more than it begins anything else.

    Args:
        loaded: In whose tokens.
        own: Paths of the model's own refusals, besides the listed ones.
    """
    found = Openings.of(lambda text: answer_ids(loaded.tokenizer, text), [tuple(path) for path in own]).paths
    worded = {path[_first_word(loaded, path) :] for path in found} - {()}
    return Openings(frozenset(path for path in worded if not any(path[:n] in worded for n in range(1, len(path)))))


def _first_word(loaded: LoadedModel, path: Sequence[int]) -> int:
    blank = [not loaded.tokenizer.decode([token]).strip() for token in path]
    return blank.index(False) if False in blank else len(path)


def measure_ranks(
    run: RunFolder,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    own: Sequence[Sequence[int]],
    system_prompt: str | None,
    max_positions: int,
    base: LoadedModel | None = None,
    site: Site = "raw",
    progress: Progress = silent,
) -> list[RankProfile]:
    """Rank profiles of every prompt with an answer, those that are missing appended."""

    def measured(items: Sequence[Forced]) -> Iterator[RankProfile]:
        return rank_profiles(
            loaded.model,
            items,
            worded_openings(loaded, own),
            vocab_size=loaded.vocab_size if base is None else check_vocabularies(loaded, base),
            max_positions=max_positions,
            base=None if base is None else base.model,
        )

    items = AlongAnswers(loaded, prompts, system_prompt, max_positions, site)
    return items.profiles(run, RANKS, RankProfile, measured, stage="token ranks", progress=progress)
