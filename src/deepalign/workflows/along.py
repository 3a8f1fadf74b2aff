"""What reads a model along reference answers: a profile for each prompt that has one, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deepalign.chat import Rendered, answer_ids, conversation, render
from deepalign.models import LoadedModel
from deepalign.progress import Progress
from deepalign.records import Prompt, Site
from deepalign.runs import RunFolder

Forced = tuple[str, Rendered]
"""A prompt's id, and it with its reference answer as the response."""


class _Profile(Protocol):
    @property
    def prompt_id(self) -> str: ...


Profile = TypeVar("Profile", bound=_Profile)


@dataclass(frozen=True, slots=True)
class AlongAnswers:
    """Reference answers along which a model is read, a profile for each prompt that has one."""

    loaded: LoadedModel
    prompts: Sequence[Prompt]
    system_prompt: str | None
    max_positions: int
    site: Site

    def profiles(
        self,
        run: RunFolder,
        file: str,
        kind: type[Profile],
        measured: Callable[[Sequence[Forced]], Iterator[Profile]],
        *,
        stage: str,
        progress: Progress,
    ) -> list[Profile]:
        """All profiles, those that are missing measured and appended."""
        found = run.records(file, kind)
        done = {profile.prompt_id for profile in found}
        usable = [prompt for prompt in self.prompts if prompt.answer]
        todo = [prompt for prompt in usable if prompt.prompt_id not in done]
        items = with_forced_answers(self.loaded, todo, self.system_prompt, self.max_positions, self.site)
        progress(stage, len(usable) - len(items), len(usable))
        with run.appender(file) as out:
            for profile in measured(items):
                out.append([profile])
                found.append(profile)
                progress(stage, len(found), len(usable))
        return found


def profiles_of(run: RunFolder, file: str, kind: type[Profile]) -> list[Profile]:
    """A run's profiles by the prompts' ids: intervals are drawn from them in order, and a file's is that of batches."""
    return sorted(run.records(file, kind), key=lambda profile: profile.prompt_id)


def with_forced_answers(
    loaded: LoadedModel, prompts: Sequence[Prompt], system_prompt: str | None, max_positions: int, site: Site
) -> list[Forced]:
    """Each prompt that has an answer, by its id, with the answer's first `max_positions` ids as the response."""
    return [
        (
            prompt.prompt_id,
            render(
                loaded.tokenizer,
                loaded.template,
                conversation(prompt.text, system_prompt),
                answer_ids(loaded.tokenizer, prompt.answer)[:max_positions],
                site,
            ),
        )
        for prompt in prompts
        if prompt.answer
    ]
