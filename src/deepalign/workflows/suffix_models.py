"""What models do in a suffix search beside being attacked: read candidates first, and confirm a suffix by its text."""

from __future__ import annotations

from collections.abc import Sequence

from deepalign.attacks.suffix import with_suffix
from deepalign.chat import conversation, render, stop_ids
from deepalign.config_suffix import SuffixConfig
from deepalign.errors import UserError
from deepalign.generation import Job, generate
from deepalign.models import LoadedModel, load_model
from deepalign.records import Sampling
from deepalign.suffix.behaviours import Behaviour, behaviour
from deepalign.suffix.drafting import Draft


def draft_model(config: SuffixConfig, loaded: LoadedModel) -> LoadedModel | None:
    """The model that reads candidates first; None where there is none.

    Raises:
        UserError: It cannot be loaded, or is the attacked model itself.
    """
    if config.draft is None:
        return None
    small = load_model(config.draft, dtype=config.dtype, device=config.device, fallback_template=loaded.template)
    if small.fingerprint == loaded.fingerprint:
        raise UserError(f"--draft {config.draft} holds the weights of the attacked model; give a smaller one, or none")
    return small


def in_drafts_ids(small: LoadedModel, config: SuffixConfig, one: Behaviour) -> Behaviour:
    """A behaviour in the draft's own ids."""
    try:
        return behaviour(
            small.tokenizer,
            small.template,
            prompt_id=one.prompt_id,
            text=one.text,
            target=one.target,
            system_prompt=one.system_prompt,
        )
    except UserError as error:
        raise UserError(f"--draft {config.draft} cannot stand in for the model: {error}") from error


def draft_of(small: LoadedModel | None, behaviours: Sequence[Behaviour]) -> Draft | None:
    """What a search is given of a draft model, for the behaviours in its ids."""
    return None if small is None else Draft(small.model, small.tokenizer, behaviours, small.fingerprint)


def says_targets(config: SuffixConfig, loaded: LoadedModel, behaviours: Sequence[Behaviour], text: str) -> bool:
    """Whether the model, given prompts and suffix as text, answers greedily with every target."""
    greedy = Sampling(temperature=0.0, max_new_tokens=config.confirm_tokens)
    asked = [conversation(with_suffix(one.text, text), one.system_prompt) for one in behaviours]
    rendered = [render(loaded.tokenizer, loaded.template, messages) for messages in asked]
    jobs = [Job(ids=one.ids, sampling=greedy, seed=0) for one in rendered]
    stops = stop_ids(loaded.tokenizer, loaded.model.generation_config)
    answers = {made.index: made.token_ids for made in generate(loaded.model, jobs, stop_ids=stops)}
    return all(
        loaded.tokenizer.decode(list(answers[index])).lstrip().startswith(one.target.strip()[: _confirmed(one, config)])
        for index, one in enumerate(behaviours)
    )


def _confirmed(one: Behaviour, config: SuffixConfig) -> int:
    """Characters of a target that so few generated tokens can hold."""
    share = min(1.0, config.confirm_tokens / len(one.target_ids))
    return int(len(one.target.strip()) * share)
