"""Abliteration of a loaded model, measured: find its refusal direction, and let it answer without.

Nothing that could be loaded into a model is written: a resumed run finds the same direction again.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from deepalign.abliteration import Ids, ablated, mean_activations
from deepalign.chat import answer_ids, assistant_header_ids, conversation, render
from deepalign.errors import UserError
from deepalign.models import LoadedModel
from deepalign.onset import Openings
from deepalign.progress import Progress, silent
from deepalign.prompts import builtin_prompts
from deepalign.prompts.sources import standing_in
from deepalign.records import Attempt, Prompt, Site
from deepalign.refusal_direction import MAX_KL, Direction, select_direction
from deepalign.runs import RunFolder
from deepalign.workflows.steps import complete

HARMFUL_SETS, HARMLESS_SET = ("should-refuse", "should-refuse-styles"), "benign"
_ENOUGH = 32
"""Built-in harmful prompts that have to be left once the audited ones are taken out; else these are used themselves."""
_HELD_OUT, _IN_MEAN = 16, 64
_MOST_POSITIONS = 8


def find_direction(
    loaded: LoadedModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt] = (),
    *,
    own: Sequence[Sequence[int]],
    system_prompt: str | None,
    seed: int,
    max_kl: float = MAX_KL,
    site: Site = "content",
    progress: Progress = silent,
) -> tuple[Direction, dict[str, Any]]:
    """A model's refusal direction, from prompts that are not audited where the built-in sets have enough of them.

    Args:
        loaded: The model.
        harmful: The prompts that are audited; used themselves, half for the means and half to choose by, where fewer
            than 32 built-in ones are left beside them.
        harmless: Default the built-in benign ones.
        own: The model's own refusal openings, as `workflows.onset.own_openings` gives them.
        system_prompt: None for no system message.
        seed: Of the split into prompts that are averaged and held out.
        max_kl: Most nats by which the ablation may move harmless prompts; infinite for no limit.
        site: Where the answer, and a refusal, begins; "content" is past a reasoning model's thoughts.
        progress: Told of the candidates tried.

    Returns:
        The direction, and the facts about it for `metrics.json`.

    Raises:
        UserError: There are fewer than two prompts of a kind, or the model gives no direction.
    """
    pool = [prompt for name in HARMFUL_SETS for prompt in builtin_prompts(name)]
    audited = set(standing_in(pool, [prompt.text for prompt in harmful]))
    beside = [prompt for prompt in pool if prompt.text not in audited]
    apart = len(beside) >= _ENOUGH
    bad_mean, bad_held = _split(beside if apart else harmful, seed, "harmful")
    good_mean, good_held = _split(harmless or builtin_prompts(HARMLESS_SET), seed, "harmless")

    def rendered(prompts: Sequence[Prompt]) -> list[Ids]:
        return [
            render(loaded.tokenizer, loaded.template, conversation(prompt.text, system_prompt), site=site).ids
            for prompt in prompts
        ]

    num_positions = _template_positions(loaded, site)
    direction = select_direction(
        loaded.model,
        mean_activations(loaded.model, rendered(bad_mean), num_positions=num_positions),
        mean_activations(loaded.model, rendered(good_mean), num_positions=num_positions),
        (rendered(bad_held), rendered(good_held)),
        Openings.of(lambda text: answer_ids(loaded.tokenizer, text), [tuple(path) for path in own]),
        vocab_size=loaded.vocab_size,
        max_kl=max_kl,
        progress=progress,
    )
    facts = {
        **dataclasses.asdict(direction.facts),
        "harmful_prompts": "builtin" if apart else "audited",
        "harmless_prompts": "given" if harmless else "builtin",
        "num_audited_among_them": 0 if apart else len(bad_mean) + len(bad_held),
        "seed": seed,
    }
    return direction, facts


def complete_ablated(
    run: RunFolder,
    loaded: LoadedModel,
    attempts: Sequence[Attempt],
    direction: Direction,
    *,
    max_batch: int | None,
    progress: Progress = silent,
) -> None:
    """Generate the missing completions of `attacks.abliteration` with the direction taken out of the model."""
    with ablated(loaded.model, direction.vector_H):
        complete(run, loaded, attempts, stage="abliteration", max_batch=max_batch, progress=progress)


def _split(prompts: Sequence[Prompt], seed: int, kind: str) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to average, and prompts held out to choose by; the same for the same seed."""
    if len(prompts) < 2:
        raise UserError(f"abliteration needs 2 {kind} prompts or more, not {len(prompts)}; give more")
    shuffled = random.Random(f"{seed} {kind}").sample(list(prompts), len(prompts))
    num_held = min(_HELD_OUT, len(prompts) // 2)
    return shuffled[num_held : num_held + _IN_MEAN], shuffled[:num_held]


def _template_positions(loaded: LoadedModel, site: Site) -> int:
    """How many of a prompt's last tokens are the template's, which the means are of; 1 where it has none."""
    try:
        header = assistant_header_ids(loaded.tokenizer, loaded.template, site)
    except UserError:
        return 1
    return min(len(header), _MOST_POSITIONS)
