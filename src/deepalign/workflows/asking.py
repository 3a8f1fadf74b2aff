"""Every attempt of an audit: planned, written down, and put to the model that it is meant for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepalign.attacks.rap import ATTACK as RAP
from deepalign.attacks.suffix import FILE as SUFFIXES
from deepalign.config import AuditConfig
from deepalign.progress import Progress
from deepalign.records import Attempt, Prompt
from deepalign.runs import RunFolder
from deepalign.workflows.abliteration import complete_ablated, find_direction
from deepalign.workflows.inputs import Inputs
from deepalign.workflows.models import AuditModels
from deepalign.workflows.planning import plan_attempts
from deepalign.workflows.rap import complete_by_rank
from deepalign.workflows.steps import ATTEMPTS, complete, completed, timed
from deepalign.workflows.suffix import searched_suffixes
from deepalign.workflows.summary import SKIPPED

STAGES = {
    "prefill": "prefill",
    RAP: "rank-assisted",
    "decoding": "decoding",
    "jailbreak": "jailbreaks",
    "suffix": "suffix",
    "any_depth": "any depth",
    "abliteration": "abliteration",
    "over_refusal": "over-refusal",
    "refusal_prefix": "refusal prefix",
}
"""Attacks in the order in which they are put to the models, with what the progress bar calls them."""


def ask(
    run: RunFolder,
    config: AuditConfig,
    inputs: Inputs,
    models: AuditModels,
    prompts: Sequence[Prompt],
    progress: Progress,
) -> None:
    """Plan every attempt, write the plan, then let each model answer its share."""
    suffixes = inputs.suffixes
    if inputs.searches:
        with timed(run, "suffix search"):
            suffixes = searched_suffixes(run, config, models.get("target"), progress)
    attempts, skipped = plan_attempts(config, inputs, models, prompts, suffixes)
    if suffixes:
        run.write_records(SUFFIXES, suffixes)
    run.write_records(SKIPPED, skipped)
    run.write_records(ATTEMPTS, attempts)
    for attack, stage in STAGES.items():
        mine = [attempt for attempt in attempts if attempt.attack == attack]
        if mine:
            with timed(run, attack):
                _complete(run, config, models, inputs.prompt_set.prompts, mine, stage, progress)


def _complete(
    run: RunFolder,
    config: AuditConfig,
    models: AuditModels,
    prompts: Sequence[Prompt],
    attempts: Sequence[Attempt],
    stage: str,
    progress: Progress,
) -> None:
    """Let one attack's model answer, in the way in which that attack has it answer."""
    first = attempts[0]
    if first.attack == RAP:
        complete_by_rank(
            run,
            models.get("target"),
            attempts,
            helper=config.rap_helper,
            base=models.get("base") if config.rap_helper == "base" else None,
            own=run.manifest["onset_openings"],
            top=config.rap_top,
            max_batch=config.max_batch,
            progress=progress,
        )
    elif first.model == "ablated":
        if "abliteration" in run.manifest and completed(run, attempts):
            # The direction is kept nowhere, and finding it again would be for nothing.
            return
        target = models.get("target")
        direction, facts = find_direction(
            target,
            prompts,
            own=run.manifest["onset_openings"],
            system_prompt=config.system_prompt,
            seed=config.seed,
            max_kl=config.ablation_kl or math.inf,
        )
        run.note(abliteration=facts)
        complete_ablated(run, target, attempts, direction, max_batch=config.max_batch, progress=progress)
    else:
        role = first.model
        reader = models.reader if role == "target" else models.get(role)
        complete(run, reader, attempts, stage=stage, engine=models.engine(role), progress=progress)
