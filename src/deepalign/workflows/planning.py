"""From prompts and settings to the list of all attempts, before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deepalign.attacks import AttackSettings
from deepalign.attacks.abliteration import abliteration_attempts
from deepalign.attacks.any_depth import any_depth_plan
from deepalign.attacks.decoding import decoding_attempts, decoding_grid, own_sampling
from deepalign.attacks.jailbreaks import jailbreak_attempts
from deepalign.attacks.plain import over_refusal_attempts, refusal_prefix_attempts
from deepalign.attacks.prefill import PrefillPlan, Skipped, prefill_plan
from deepalign.attacks.rap import rap_plan
from deepalign.attacks.suffix import Suffix, suffix_attempts
from deepalign.chat import answer_ids, assistant_header_ids, conversation, render
from deepalign.config import AuditConfig
from deepalign.errors import UserError
from deepalign.readers import Reads
from deepalign.records import Attempt, Prompt
from deepalign.workflows.inputs import Inputs, any_depths
from deepalign.workflows.models import AuditModels

PLANNED = (
    "prefill",
    "rap",
    "any_depth",
    "over_refusal",
    "decoding",
    "jailbreak",
    "suffix",
    "abliteration",
    "refusal_prefix",
)
"""Attacks in the order of the plan; within one, all that is done to a prompt stands together."""


def plan_attempts(
    config: AuditConfig, inputs: Inputs, models: AuditModels, prompts: Sequence[Prompt], suffixes: Sequence[Suffix]
) -> tuple[list[Attempt], list[Skipped]]:
    """Attempts of every probe that generates, and what could not be attempted."""
    target = models.reader
    settings = _attack_settings(config, target)
    forced = replace(settings, site=config.site)
    plans: list[PrefillPlan] = []
    if "prefill" in inputs.probes:
        plans.append(prefill_plan(prompts, config.depths, forced))
    if "rap" in inputs.probes:
        plans.append(rap_plan(prompts, config.rap_depths, forced))
    if "any-depth" in inputs.probes:
        header = assistant_header_ids(target.tokenizer, target.template, config.site)
        plans.append(any_depth_plan(prompts, any_depths(config), forced, header))
    attempts = [attempt for plan in plans for attempt in plan.attempts]
    for found in inputs.own_harmless:
        attempts += over_refusal_attempts(found.name, found.prompts, settings)
    if "decoding" in inputs.probes:
        own = own_sampling(target.generation_config, config.max_new_tokens)
        blank = replace(settings, system_prompt=_system_prompt(config.decoding_system_prompt, target))
        attempts += decoding_attempts(prompts, blank, decoding_grid(own, config.grid))
    if "jailbreaks" in inputs.probes:
        attempts += jailbreak_attempts(
            prompts, inputs.own_jailbreaks, settings, system_role=_renders(target, "Be brief.")
        )
    if "suffix" in inputs.probes:
        attempts += suffix_attempts(prompts, suffixes, settings)
    if "abliteration" in inputs.probes:
        attempts += abliteration_attempts(prompts, settings)
    if "refusal-prefix" in inputs.probes:
        attempts += refusal_prefix_attempts(prompts, _attack_settings(config, models.get("base")))
    return attempts, [skip for plan in plans for skip in plan.skipped]


def _renders(loaded: Reads, system_prompt: str) -> bool:
    """Whether the template takes such a system message."""
    try:
        render(loaded.tokenizer, loaded.template, conversation("Hello", system_prompt))
    except UserError:
        return False
    return True


def _system_prompt(asked: str, loaded: Reads) -> str | None:
    """The system prompt asked for; none instead of a blank one where the template knows no system role."""
    return asked if asked or _renders(loaded, asked) else None


def _attack_settings(config: AuditConfig, loaded: Reads) -> AttackSettings:
    tokenizer = loaded.tokenizer
    return AttackSettings(
        encode=lambda text: answer_ids(tokenizer, text),
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        system_prompt=config.system_prompt,
        sampling=config.sampling,
        samples=config.samples,
        seed=config.seed,
    )
