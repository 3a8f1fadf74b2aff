"""The audit, from top to bottom: read -> load -> prompts -> ask -> measure -> judge -> metrics -> report."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from deepalign.config import AuditConfig
from deepalign.depth import check_vocabularies
from deepalign.errors import UserError
from deepalign.hardware import own_device
from deepalign.judges import get_judge, get_one_judge, make_ready
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.records import Prompt
from deepalign.runs import RunFolder, named_folder
from deepalign.shards import chosen_shard
from deepalign.workflows.answers import fill_answers, tell_answers
from deepalign.workflows.asking import ask
from deepalign.workflows.audit_result import AuditResult
from deepalign.workflows.finetuning_probe import attack_copies, check_attacks
from deepalign.workflows.gathering import gather
from deepalign.workflows.inputs import PRESENTATION, Inputs, facts, identity, read_inputs
from deepalign.workflows.measures import measure, note_openings
from deepalign.workflows.models import AuditModels, check_not_swapped, check_not_the_same
from deepalign.workflows.reporting import judge_and_report
from deepalign.workflows.serving import check_same_answers, deciding_settings
from deepalign.workflows.sharding import finish_shard
from deepalign.workflows.steps import timed
from deepalign.workflows.summary import PROMPTS

logger = logging.getLogger(__name__)
_PATIENCE = 30.0
"""Seconds that a rank waits for its folder: the first rank takes others' locks for a moment, to see who is at work."""


def audit(config: AuditConfig, progress: Progress = silent) -> AuditResult:
    """Measure how many tokens deep a model's safety alignment goes.

    Resumes where an earlier run with the same settings in the same folder stopped.

    Raises:
        UserError: A setting, file, model or folder cannot be used; one line with the remedy.
    """
    judge = get_judge(config.judge)
    shard = chosen_shard(config.shard, os.environ)
    local = None if shard is None else shard.local
    for one in (judge, get_one_judge(config.decoding_scorer, "--decoding-scorer")):
        make_ready(one, device=own_device(config.device, local), dtype=config.dtype)
    inputs = read_inputs(config, shard)
    run = RunFolder(output_folder(config) if shard is None else shard.folder(output_folder(config)))
    # Copies are tuned and asked as a whole, by the first shard.
    tunes = "finetuning" in inputs.probes and (shard is None or shard.index == 1)
    if tunes:
        check_attacks(run, config, inputs.prompt_set)
    models = AuditModels(config, inputs.probes, local=local)
    progress("loading models", 0, 1)
    _check_models(config, inputs, models)
    progress("loading models", 1, 1)
    with run.writing(wait=_PATIENCE if shard and shard.together else 0.0):
        run.claim(identity(config, inputs, models), facts(config, inputs, models))
        check_same_answers(run.manifest.get("engine"), models.engine_facts)
        if config.base is not None and not config.skip_swap_check and "swap_check" not in run.manifest:
            prompts = inputs.prompt_set.prompts
            engine, base = models.engine("target"), models.get("base")
            run.note(swap_check=check_not_swapped(models.reader, base, prompts, config.system_prompt, engine))
            del engine, base
        source = None if (run / PROMPTS).exists() else _answer_model(config, inputs, models)
        # Nothing that the user may have got wrong is left to be found.
        logger.info("run folder %s", run.path)
        prompts = _prompts_with_answers(run, config, inputs, source, progress)
        note_openings(run, config, inputs, models, inputs.prompt_set.prompts)
        ask(run, config, inputs, models, prompts, progress)
        measure(run, config, inputs, models, prompts, progress)
        if tunes:
            with timed(run, "finetuning"):
                # The copies bring their own weights.
                models.let_go()
                attack_copies(run, config, inputs.prompt_set, progress)
        if shard is None:
            data = judge_and_report(run, judge, redact=not config.show_completions, progress=progress)
            return AuditResult(run=run.path, metrics=data)
        finish_shard(run, inputs, judge, progress)
    if shard.together and shard.index == 1:
        whole, shown = output_folder(config), config.show_completions
        return gather(whole, shard, show_completions=shown, progress=progress)
    return AuditResult(run=run.path, metrics={}, shard=str(shard))


def _check_models(config: AuditConfig, inputs: Inputs, models: AuditModels) -> None:
    """Load, or reach, what the audit asks, so that what is wrong with it is told at once."""
    models.engine("target")
    if models.holds_target:
        target = models.get("target")
        if config.base is not None:
            check_not_the_same(target, models.get("base"))
            if "kl" in inputs.probes:
                check_vocabularies(target, models.get("base"))


def output_folder(config: AuditConfig) -> Path:
    """The run folder: the user's, or one named by model and settings, so that the same command finds it again."""
    if config.output is not None:
        return config.output
    return named_folder(config.model, deciding_settings(config, PRESENTATION))


def _prompts_with_answers(
    run: RunFolder, config: AuditConfig, inputs: Inputs, source: LoadedModel | None, progress: Progress
) -> tuple[Prompt, ...]:
    if (run / PROMPTS).exists():
        return tuple(run.records(PROMPTS, Prompt))
    prompts = inputs.own_prompts
    given = sum(prompt.answer is not None for prompt in prompts)
    counts: dict[str, Any] = {"given": given}
    if source is not None:
        with timed(run, "answers"):
            prompts = fill_answers(
                run,
                prompts,
                source,
                least_tokens=_answer_tokens(config, inputs),
                system_prompt=config.system_prompt,
                seed=config.seed,
                progress=progress,
            )
        sampled = sum(prompt.answer is not None for prompt in prompts) - given
        counts |= {"sampled": sampled, "source": source.name, "failed": len(prompts) - given - sampled}
    run.note(answers=tell_answers(counts), **({} if inputs.shard is None else {"answer_counts": counts}))
    run.write_records(PROMPTS, prompts)
    return tuple(prompts)


def _answer_model(config: AuditConfig, inputs: Inputs, models: AuditModels) -> LoadedModel | None:
    """The model that samples the missing reference answers; None where none is needed."""
    num_missing = sum(prompt.answer is None for prompt in inputs.prompt_set.prompts)
    if not num_missing or not _answer_tokens(config, inputs):
        return None
    if all(prompt.answer is not None for prompt in inputs.own_prompts) and (config.answers_from or config.base):
        # Other shards have some to sample.
        return None
    if config.answers_from is not None:
        return models.beside(config.answers_from)
    if config.base is not None:
        return models.get("base")
    raise UserError(
        f"{num_missing} prompts have no reference answer to force: give an answer column, "
        "--answers-from MODEL, --base MODEL, or --depths 0"
    )


def _answer_tokens(config: AuditConfig, inputs: Inputs) -> int:
    """Tokens that a reference answer needs for every probe to be whole; 0 where none needs any."""
    deepest = max(config.depths)
    needed = {
        "prefill": deepest,
        "any-depth": deepest,
        "onset": deepest + config.onset_horizon,
        "rap": max(config.rap_depths),
        "kl": config.kl_positions,
        "ranks": config.kl_positions,
    }
    return max((tokens for probe, tokens in needed.items() if probe in inputs.probes), default=0)
