"""The suffix search as a run: prompts and targets -> searches that can be stopped and go on -> `suffixes.jsonl`.

What it finds is measured by an audit, with the same prompts, judge and counts as every other attack. An audit that is
to search for itself does so in a folder inside its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.attacks.suffix import FILE, Suffix
from deepalign.chat import answer_ids
from deepalign.config import AuditConfig, settings_of
from deepalign.config_suffix import SuffixConfig
from deepalign.errors import UserError
from deepalign.models import LoadedModel, load_model
from deepalign.progress import Progress, silent
from deepalign.prompts.sources import Columns, PromptSet, load_prompts
from deepalign.records import Prompt
from deepalign.runs import RunFolder, named_folder
from deepalign.suffix.behaviours import Behaviour, behaviour
from deepalign.suffix.drafting import Draft
from deepalign.suffix.search import SearchResult, SearchSettings, SearchState, search
from deepalign.workflows.answers import fill_answers
from deepalign.workflows.models import model_card
from deepalign.workflows.suffix_models import draft_model, draft_of, in_drafts_ids, says_targets

SEARCH = "suffix-search"
_SAVED_EVERY = 10.0
"""Seconds between two savings of a search that goes on."""
_AUDITS: dict[str, Any] = {"behaviours": 8, "width": 128, "top_k": 128, "at_once": True}
_BINDING = ("output", "steps", "runs")
"""More steps or runs in the same folder go on from what is there."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuffixResult:
    """What a search of suffixes leaves behind."""

    run: Path
    """The run folder."""
    suffixes: tuple[Suffix, ...]
    """In the order of its runs and prompts."""

    @property
    def file(self) -> Path:
        """The file of them, which `audit --suffix` replays."""
        return self.run / FILE


def suffix_search(config: SuffixConfig, progress: Progress = silent) -> SuffixResult:
    """Search suffixes on a model (Zou et al. 2023; paper App. B.4: one for all prompts, of each run).

    Resumes where an earlier search with the same settings in the same folder stopped.

    Raises:
        UserError: A setting, file, model or folder cannot be used; one line with the remedy.
    """
    found = _prompts(config)
    run = RunFolder(config.output or named_folder(config.model, settings_of(config, _BINDING), "suffix"))
    progress("loading model", 0, 1)
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        chat_template=config.chat_template,
    )
    progress("loading model", 1, 1)
    suffixes = search_all(run, config, loaded, found, progress)
    return SuffixResult(run=run.path, suffixes=suffixes)


def searched_suffixes(
    run: RunFolder, config: AuditConfig, loaded: LoadedModel, progress: Progress
) -> tuple[Suffix, ...]:
    """Suffixes that an audit searches for itself: one for all prompts, on prompts that it does not ask.

    A small search, on few prompts: it is a floor of what an attacker reaches.
    """
    settings = SuffixConfig(
        model=config.model,
        **_AUDITS,
        steps=config.suffix_steps,
        system_prompt=config.system_prompt,
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
    )
    return search_all(RunFolder(run / SEARCH), settings, loaded, _prompts(settings), progress)


def search_all(
    run: RunFolder, config: SuffixConfig, loaded: LoadedModel, found: PromptSet, progress: Progress
) -> tuple[Suffix, ...]:
    """Every search of a configuration, those that are missing; each is saved as it goes and written when it ends."""
    with run.writing():
        binding = settings_of(config, _BINDING)
        small = draft_model(config, loaded)
        identity = {"prompt_hash": found.hash, "model_fingerprint": loaded.fingerprint, "dtype": loaded.dtype}
        if small is not None:
            identity["draft_fingerprint"] = small.fingerprint
        facts = {
            "command": "suffix",
            "models": {"target": model_card(loaded)},
            "skipped_rows": list(found.skipped_rows),
        }
        run.claim(binding | identity | {"template_hash": loaded.template.hash}, facts)
        logger.info("run folder %s", run.path)
        prompts = _with_targets(run, config, found.prompts, progress)
        behaviours = [_behaviour(loaded, config, prompt) for prompt in prompts]
        drafted = [in_drafts_ids(small, config, one) for one in behaviours] if small is not None else []
        done = {(one.name, one.prompt): one for one in run.records(FILE, Suffix) if _whole(one, config)}
        made = []
        for number in range(config.runs):
            groups = [[one] for one in behaviours] if config.per_prompt else [behaviours]
            for index, group in enumerate(groups):
                draft = draft_of(small, drafted[index : index + 1] if config.per_prompt else drafted)
                name = f"{'per-prompt' if config.per_prompt else 'universal'}-s{config.seed + number}"
                prompt = group[0].text if config.per_prompt else ""
                known = done.get((name, prompt))
                if known is None:
                    state = f"state-{name}{f'-{index}' if config.per_prompt else ''}.json"
                    known = _searched(run, config, loaded, group, name, state, config.seed + number, draft, progress)
                    done[name, prompt] = known
                    run.write_records(FILE, done.values())
                made.append(known)
    return tuple(made)


def _whole(one: Suffix, config: SuffixConfig) -> bool:
    """Whether a search has gone as far as the settings have it go."""
    return one.stopped != "steps" or (one.steps or 0) >= config.steps


def _prompts(config: SuffixConfig) -> PromptSet:
    columns = Columns(text=config.text_column, answer=config.answer_column)
    return load_prompts(config.prompts, columns, skip_bad_rows=config.skip_bad_rows, limit=config.behaviours)


def _with_targets(
    run: RunFolder, config: SuffixConfig, prompts: Sequence[Prompt], progress: Progress
) -> Sequence[Prompt]:
    if config.answers_from is None or all(prompt.answer for prompt in prompts):
        return prompts
    source = load_model(config.answers_from, dtype=config.dtype, device=config.device)
    return fill_answers(
        run,
        prompts,
        source,
        least_tokens=config.target_tokens,
        system_prompt=config.system_prompt,
        seed=config.seed,
        progress=progress,
    )


def _behaviour(loaded: LoadedModel, config: SuffixConfig, prompt: Prompt) -> Behaviour:
    return behaviour(
        loaded.tokenizer,
        loaded.template,
        prompt_id=prompt.prompt_id,
        text=prompt.text,
        target=_target(loaded.tokenizer, config, prompt),
        system_prompt=config.system_prompt,
    )


def _target(tokenizer: Any, config: SuffixConfig, prompt: Prompt) -> str:
    """What the answer is to begin with: the longest beginning of the prompt's answer that its tokens give back."""
    ids = answer_ids(tokenizer, prompt.answer or "")[: config.target_tokens]
    for count in range(len(ids), 0, -1):
        text = tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False)
        if answer_ids(tokenizer, text) == ids[:count] and (prompt.answer or "").startswith(text):
            return str(text)
    return config.target


def _searched(
    run: RunFolder,
    config: SuffixConfig,
    loaded: LoadedModel,
    behaviours: Sequence[Behaviour],
    name: str,
    state_file: str,
    seed: int,
    draft: Draft | None,
    progress: Progress,
) -> Suffix:
    saved = time.monotonic()

    def save(state: SearchState) -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVED_EVERY or state.stopped or state.step >= config.steps:
            run.write_text(state_file, json.dumps(state.to_json()))
            saved = time.monotonic()

    result = search(
        loaded.model,
        loaded.tokenizer,
        behaviours,
        _settings(config, seed),
        state=_state(run, state_file),
        on_step=save,
        confirm=lambda text: says_targets(config, loaded, behaviours, text),
        draft=draft,
        progress=progress,
    )
    if not result.comes_back:
        logger.warning("%s does not come back as the same tokens behind every prompt", name)
    return _record(config, loaded, behaviours, name, seed, result)


def _settings(config: SuffixConfig, seed: int) -> SearchSettings:
    return SearchSettings(
        suffix_tokens=config.length,
        initial=config.init,
        steps=config.steps,
        search_width=config.width,
        topk=config.top_k,
        n_replace=config.replace,
        n_replace_steps=config.replace_steps,
        order=config.order,
        merge=config.merge,
        buffer_size=config.buffer,
        mellowmax=config.mellowmax,
        momentum=config.momentum,
        progressive=not config.at_once,
        behaviours_per_step=config.behaviours_per_step,
        seed=seed,
        allow_non_ascii=config.allow_non_ascii,
        early_stop=config.early_stop,
    )


def _state(run: RunFolder, name: str) -> SearchState | None:
    path = run / name
    if not path.exists():
        return None
    try:
        return SearchState.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and that search begins anew") from error


def _record(
    config: SuffixConfig,
    loaded: LoadedModel,
    behaviours: Sequence[Behaviour],
    name: str,
    seed: int,
    result: SearchResult,
) -> Suffix:
    return Suffix(
        name=name,
        text=result.text,
        kind="per-prompt" if config.per_prompt else "universal",
        prompt=behaviours[0].text if config.per_prompt else "",
        ids=result.suffix_ids,
        loss=sum(result.losses) / len(result.losses),
        losses=result.trace,
        steps=result.steps,
        stopped=result.stopped,
        num_behaviours=len(behaviours),
        num_evaluated=result.evaluated,
        num_drifted=result.drifted,
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        template_hash=loaded.template.hash,
        seed=seed,
    )
