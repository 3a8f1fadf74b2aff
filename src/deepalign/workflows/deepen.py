"""Deepening, from top to bottom: load -> sample -> mix -> train -> save -> perplexity -> audits -> report."""

from __future__ import annotations

from typing import Any

from deepalign.chat import stop_ids
from deepalign.config_tuning import DeepenConfig
from deepalign.models import LoadedModel, load_model
from deepalign.progress import Progress, silent
from deepalign.recovery import RecoverySchedule
from deepalign.runs import RunFolder
from deepalign.training.mixture import Mixture, MixturePlan, mix
from deepalign.weights import require_name
from deepalign.workflows import tuning
from deepalign.workflows.before_after import TuningResult, check_apart
from deepalign.workflows.ingredients import Ingredients, Wanted, check_room, gather, read_wanted


def deepen(config: DeepenConfig, progress: Progress = silent) -> TuningResult:
    """Train a model to come back from harmful beginnings (paper section 3), and measure what that did.

    Resumes where an earlier run with the same settings in the same folder stopped.

    Raises:
        UserError: A setting, file, model or folder cannot be used; one line with the remedy.
    """
    plan = _plan(config)
    wanted = read_wanted(config)
    check_apart(config, tuple(prompt.text for prompt in wanted.harmful))
    if _needs_source(config, wanted):
        require_name(config.answers_from)
    job = tuning.Job(
        command="deepen",
        config=config,
        identity={"prompt_hash": wanted.hash},
        facts={"skipped_rows": list(wanted.skipped_rows), "sets": _sets(config)},
        about=(
            f"{config.model}, trained by deepalign to refuse also after it has begun a harmful answer (safety-recovery "
            "examples, Qi et al., ICLR 2025)."
        ),
        kept_set=f"own answers to held-out prompts of {config.anchors}",
        check=lambda loaded: check_room(config, wanted, loaded),
    )

    def work(run: RunFolder, loaded: LoadedModel) -> tuning.Work:
        ingredients = _ingredients(run, config, wanted, loaded, progress)
        mixture = mix(ingredients.sources, ingredients.anchors, plan, stop_ids(loaded.tokenizer))
        counts = ingredients.counts | {
            "steps": mixture.num_steps,
            "recovery_prompts_too_long": mixture.num_too_long,
            "anchors_cut": mixture.num_cut_anchors,
        }
        return tuning.Work(
            make_trainer=lambda: _trainer(run, config, plan, mixture, loaded),
            held_out=lambda _: ingredients.held_out,
            counts=lambda _: counts,
            share=config.interpolate,
        )

    return tuning.run_job(job, work, progress)


def _needs_source(config: DeepenConfig, wanted: Wanted) -> bool:
    """Whether another model has to give answers."""
    return bool(wanted.look_alikes) or any(prompt.answer is None for prompt in wanted.harmful)


def _sets(config: DeepenConfig) -> dict[str, Any]:
    return {"harmful": config.prompts, "anchors": config.anchors, "look_alikes": config.look_alikes}


def _plan(config: DeepenConfig) -> MixturePlan:
    return MixturePlan(
        schedule=RecoverySchedule(share=config.share, longest=config.longest, seed=config.seed),
        alpha=config.alpha,
        dense=config.dense,
        epochs=config.epochs,
        recovery_batch=config.recovery_batch,
        anchor_batch=config.anchor_batch,
        max_length=config.max_length,
        seed=config.seed,
    )


def _ingredients(
    run: RunFolder, config: DeepenConfig, wanted: Wanted, loaded: LoadedModel, progress: Progress
) -> Ingredients:
    source = None
    if _needs_source(config, wanted):
        source = load_model(config.answers_from, device=config.device, fallback_template=loaded.template)
    return gather(run, config, wanted, loaded, source, progress)


def _trainer(run: RunFolder, config: DeepenConfig, plan: MixturePlan, mixture: Mixture, loaded: LoadedModel) -> Any:
    from datasets import Dataset

    rows = tuning.micro_batch(plan.step_rows, config.micro_batch)
    return tuning.make_trainer(
        run,
        loaded,
        config,
        Dataset.from_list(mixture.rows),
        objective="sft",
        group_weights=plan.group_weights,
        # The rows stand in the order of the plan.
        train_sampling_strategy="sequential",
        max_length=None,
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=plan.step_rows // rows,
        adam_beta1=0.9,
    )
