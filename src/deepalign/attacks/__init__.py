"""What is done to a prompt: each attack turns prompts into attempts, and neither generates nor judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deepalign.chat import conversation
from deepalign.records import Attempt, Key, Prompt, Role, Sampling, Site


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackSettings:
    """What every attack needs to know of the run and of the model's vocabulary."""

    encode: Callable[[str], tuple[int, ...]]
    """Response text to token ids of the model that answers."""
    decode: Callable[[Sequence[int]], str]
    system_prompt: str | None
    """None for no system message."""
    sampling: Sampling
    samples: int
    """Attempts for each prompt and variant."""
    seed: int
    """The run's seed."""
    site: Site = "raw"
    """Where in the assistant's turn prefills are put."""

    @property
    def greedy(self) -> AttackSettings:
        """The same for an attack that is greedy by nature: temperature 0 and one attempt."""
        return replace(self, sampling=replace(self.sampling, temperature=0.0), samples=1)


def attempts(
    prompt: Prompt,
    settings: AttackSettings,
    *,
    attack: str,
    variant: str,
    prefill_ids: tuple[int, ...] = (),
    model: Role = "target",
) -> list[Attempt]:
    """One prompt's attempts under one variant of an attack, one for each sample."""
    keys = [
        Key(prompt_id=prompt.prompt_id, attack=attack, variant=variant, sample=sample)
        for sample in range(settings.samples)
    ]
    return [
        Attempt(
            prompt_id=key.prompt_id,
            attack=key.attack,
            variant=key.variant,
            sample=key.sample,
            model=model,
            messages=conversation(prompt.text, settings.system_prompt),
            prefill_ids=prefill_ids,
            prefill_text=settings.decode(prefill_ids) if prefill_ids else "",
            site=settings.site,
            category=prompt.category,
            sampling=settings.sampling,
            seed=row_seed(settings.seed, key, model),
        )
        for key in keys
    ]


def row_seed(seed: int, key: Key, model: str) -> int:
    """Seed of one row's random stream, 64 bits, from the run's seed and the row's key alone."""
    text = f"{seed}\x1f{key.prompt_id}\x1f{key.attack}\x1f{key.variant}\x1f{key.sample}\x1f{model}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
