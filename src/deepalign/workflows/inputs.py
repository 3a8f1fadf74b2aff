"""What an audit reads before it measures anything: prompts, harmless prompts, wrappings, suffixes, and which probes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from deepalign.attacks.jailbreaks import Artifact, Wrapping
from deepalign.attacks.suffix import Suffix, read_suffixes
from deepalign.chat import assistant_header_ids, conversation, render
from deepalign.config import PROBES, AuditConfig
from deepalign.errors import UserError
from deepalign.prompts.jailbreak_files import Jailbreaks, load_jailbreaks
from deepalign.prompts.sources import Columns, PromptSet, load_prompts
from deepalign.records import Prompt
from deepalign.shards import Shard
from deepalign.workflows.models import AuditModels, model_card
from deepalign.workflows.serving import deciding_settings, without_weights

PRESENTATION = ("output", "shard", "show_completions", "max_batch", "skip_swap_check")
"""Settings that do not change the result, and so may differ when a run is resumed; `identity` binds a shard itself."""
_NEEDS_BASE = ("refusal-prefix", "kl")
_NUM_FIRST_IDS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was read before anything is measured."""

    prompt_set: PromptSet
    harmless: tuple[PromptSet, ...]
    probes: tuple[str, ...]
    not_run: dict[str, str]
    jailbreaks: Jailbreaks
    suffixes: tuple[Suffix, ...]
    """Those to replay; none where they are searched."""
    shard: Shard | None = None
    """Which part of all this is asked; None for the whole."""

    @property
    def searches(self) -> bool:
        """Whether suffixes are searched on the model itself."""
        return "suffix" in self.probes and not self.suffixes

    @property
    def own_prompts(self) -> tuple[Prompt, ...]:
        """The should-refuse prompts of this shard; all of them where there is none."""
        return self._own(self.prompt_set.prompts, 0)

    @property
    def own_harmless(self) -> tuple[PromptSet, ...]:
        """The harmless sets, each with the prompts of this shard."""
        before = len(self.prompt_set.prompts)
        found = []
        for one in self.harmless:
            found.append(replace(one, prompts=self._own(one.prompts, before)))
            before += len(one.prompts)
        return tuple(found)

    @property
    def own_jailbreaks(self) -> tuple[Wrapping | Artifact, ...]:
        """Wrappings, which the shard's prompts are put in, and artifacts with the rows of this shard."""
        if self.shard is None:
            return tuple(self.jailbreaks)
        return tuple(
            replace(one, rows=self.shard.share(one.rows, [row.row_id for row in one.rows]))
            if isinstance(one, Artifact)
            else one
            for one in self.jailbreaks
        )

    def _own(self, prompts: tuple[Prompt, ...], before: int) -> tuple[Prompt, ...]:
        if self.shard is None:
            return prompts
        return self.shard.share(prompts, [f"{prompt.prompt_id}\x1f{prompt.text}" for prompt in prompts], before)


def read_inputs(config: AuditConfig, shard: Shard | None = None) -> Inputs:
    """Read everything that the settings name, which is the same for every shard.

    Raises:
        UserError: A file or name cannot be used, or no probe is left.
    """
    columns = Columns(
        text=config.text_column,
        answer=config.answer_column,
        category=config.category_column,
        prompt_id=config.id_column,
    )
    prompt_set = load_prompts(config.prompts, columns, skip_bad_rows=config.skip_bad_rows, limit=config.limit)
    probes, not_run = _probes(config, prompt_set)
    names = config.over_refusal_sets if "over-refusal" in probes else ()
    harmless = [
        load_prompts(name, columns, skip_bad_rows=config.skip_bad_rows, option="--over-refusal-sets") for name in names
    ]
    # A set named twice, in whatever spelling, is one set: its rows would share their keys.
    once = tuple({found.name: found for found in harmless}.values())
    inputs = Inputs(
        shard=shard,
        prompt_set=prompt_set,
        harmless=once,
        probes=probes,
        not_run=not_run,
        jailbreaks=load_jailbreaks(config.jailbreaks if "jailbreaks" in probes else ()),
        suffixes=read_suffixes(config.suffix) if "suffix" in probes and config.suffix else (),
    )
    if shard is not None:
        _check_shard(shard, inputs)
    return inputs


def _check_shard(shard: Shard, inputs: Inputs) -> None:
    num_prompts = len(inputs.prompt_set.prompts)
    if shard.count > num_prompts:
        raise UserError(f"--shard {shard}: there are only {num_prompts} prompts; give at most {num_prompts} shards")
    if inputs.searches:
        raise UserError(
            f"--shard {shard}: the suffix probe searches one suffix for all shards; search it once with deepalign "
            "suffix and give every shard --suffix FILE, or leave the probe out with --probes"
        )


def _probes(config: AuditConfig, prompt_set: PromptSet) -> tuple[tuple[str, ...], dict[str, str]]:
    """The probes that can run, and why each other is left out."""
    probes: tuple[str, ...] = config.chosen_probes
    if config.suffix is not None and config.probes is None and "suffix" not in probes:
        # Whoever gives suffixes wants them tried.
        probes = (*probes, "suffix")
    not_run = {probe: "not asked for" for probe in PROBES if probe not in probes}
    impossible: dict[str, str] = {}
    if config.base is None:
        impossible |= dict.fromkeys(_NEEDS_BASE, "needs --base")
        if config.rap_helper == "base":
            impossible["rap"] = "--rap-helper base needs --base"
    without = config.base is None and config.answers_from is None
    if max(config.depths) == 0 and without and not any(prompt.answer for prompt in prompt_set.prompts):
        # Nothing is to be forced, and there is nothing to read along: the other probes can do without.
        impossible |= dict.fromkeys(("onset", "ranks", "rap", "any-depth"), "no reference answers")
    impossible = without_weights(config) | impossible
    not_run |= {probe: reason for probe, reason in impossible.items() if probe in probes}
    left = tuple(probe for probe in probes if probe not in impossible)
    if not left:
        reasons = "; ".join(dict.fromkeys(f"{probe} {impossible[probe]}" for probe in probes))
        raise UserError(f"--probes {' '.join(probes)} cannot run: {reasons}")
    return left, not_run


def identity(config: AuditConfig, inputs: Inputs, models: AuditModels) -> dict[str, Any]:
    """Everything that decides the numbers; a folder is bound to it."""
    held = models.get("target") if models.holds_target else None
    return {
        **deciding_settings(config, PRESENTATION),
        **models.engine_identity,
        **({} if inputs.shard is None else {"shard": str(inputs.shard)}),
        "probes": list(inputs.probes),
        "prompt_hash": inputs.prompt_set.hash,
        "harmless_hashes": [found.hash for found in inputs.harmless],
        "jailbreak_hash": inputs.jailbreaks.hash,
        "suffix_texts": [suffix.text for suffix in inputs.suffixes],
        "model_fingerprint": held.fingerprint if held else None,
        "base_fingerprint": models.get("base").fingerprint if config.base else None,
        "template_hash": models.reader.template.hash,
        "loaded_dtype": held.dtype if held else None,
    }


def _any_depth(config: AuditConfig, models: AuditModels) -> dict[str, Any]:
    """Where the assistant header is put in again, and what it is; without one the probe cannot run."""
    target = models.reader
    header = assistant_header_ids(target.tokenizer, target.template, config.site)
    return {"depths": list(any_depths(config)), "header": target.tokenizer.decode(header)}


def any_depths(config: AuditConfig) -> tuple[int, ...]:
    """Numbers of answer tokens after which the assistant header is put in again."""
    every = config.any_depth_every
    return tuple(range(every, max(*config.depths, every) + 1, every))


def facts(config: AuditConfig, inputs: Inputs, models: AuditModels) -> dict[str, Any]:
    """What a reader of the manifest wants to know and nothing depends on."""
    target = models.reader
    first = inputs.prompt_set.prompts[0]
    messages = conversation(first.text, config.system_prompt)
    ids = render(target.tokenizer, target.template, messages, site=config.site).ids
    skipped_rows = [
        *(f"{found.name}, {row}" for found in (inputs.prompt_set, *inputs.harmless) for row in found.skipped_rows),
        *inputs.jailbreaks.skipped_rows,
    ]
    return {
        "models": {
            "target": models.target_card,
            "base": model_card(models.get("base")) if config.base else None,
        },
        "engine": models.engine_facts,
        "prompt_set": inputs.prompt_set.name,
        "num_prompts": len(inputs.prompt_set.prompts),
        "skipped_rows": skipped_rows,
        "not_run": inputs.not_run,
        "first_ids": list(ids[:_NUM_FIRST_IDS]),
        "first_tokens": [target.tokenizer.decode([token]) for token in ids[:_NUM_FIRST_IDS]],
        "first_prompt": target.tokenizer.decode(ids),
        "answers": "not needed",
        "jailbreak_sources": {one.name: one.source for one in inputs.jailbreaks},
        **({} if inputs.shard is None else {"shard": {"index": inputs.shard.index, "count": inputs.shard.count}}),
        **({"any_depth": _any_depth(config, models)} if "any-depth" in inputs.probes else {}),
    }
