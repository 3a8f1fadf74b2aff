"""Reference answers for prompts that have none: sampled from an unaligned model, kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepalign.attacks import row_seed
from deepalign.chat import answer_ids, conversation, render, stop_ids
from deepalign.generation import Job, generate
from deepalign.judges import get_judge
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.prompts.sources import with_answers
from deepalign.records import JudgeInput, Key, Prompt, Sampling, Site
from deepalign.runs import RunFolder

FILE = "answers.jsonl"
ROUNDS = 4
_SPARE_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAnswer:
    """What a model wrote for one prompt in one round."""

    prompt_id: str
    round: int
    model: str
    text: str
    num_tokens: int
    """Length of the text in the model's own tokens."""
    complied: bool
    """Whether the rule-based judge takes it for an answer."""
    refused: bool = False
    """Whether it takes it for a refusal from the first word on."""
    token_ids: tuple[int, ...] = ()
    """What was written, without the stop token."""
    finish: Literal["stop", "length", ""] = ""


def fill_answers(
    run: RunFolder,
    prompts: Sequence[Prompt],
    source: LoadedModel,
    *,
    least_tokens: int,
    system_prompt: str | None,
    seed: int,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> tuple[Prompt, ...]:
    """The prompts, with answers sampled for those that had none.

    Up to `rounds` answers are sampled for each; a prompt leaves once it has one that complies and is long enough. A
    prompt that never does keeps its longest complying answer, or none, and is then named as skipped by the attacks.
    """
    known = sample_answers(
        run,
        FILE,
        [prompt for prompt in prompts if prompt.answer is None],
        source,
        good=lambda answer: answer.complied and answer.num_tokens >= least_tokens,
        sampling=Sampling(max_new_tokens=least_tokens + _SPARE_TOKENS),
        system_prompt=system_prompt,
        seed=seed,
        rounds=rounds,
        stage="sampling answers",
        progress=progress,
    )
    return with_answers(prompts, {prompt_id: answer.text for prompt_id, answer in _longest(known).items()})


def tell_answers(counts: Mapping[str, Any]) -> str:
    """Where answers came from, in words: those `given`, and where some were missing `sampled`, `source`, `failed`."""
    told = f"{counts['given']} given with the prompts"
    if "source" in counts:
        told += f", {counts['sampled']} sampled from {counts['source']}, {counts['failed']} could not be sampled"
    return told


def sample_answers(
    run: RunFolder,
    file: str,
    prompts: Sequence[Prompt],
    source: LoadedModel,
    *,
    good: Callable[[SampledAnswer], bool],
    sampling: Sampling,
    system_prompt: str | None,
    seed: int,
    stage: str,
    site: Site = "raw",
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> list[SampledAnswer]:
    """Up to `rounds` answers to each prompt, until one is good; kept in a file of the run, and not sampled twice."""
    if not prompts:
        return []
    known = run.records(file, SampledAnswer)
    with run.appender(file) as out:
        for number in range(rounds):
            done = {answer.prompt_id for answer in known if answer.round == number or good(answer)}
            todo = [prompt for prompt in prompts if prompt.prompt_id not in done]
            made = _sample(source, todo, number, sampling, system_prompt, seed, site)
            for count, answer in enumerate(made, start=1):
                out.append([answer])
                known.append(answer)
                progress(stage, len(prompts) - len(todo) + count, len(prompts))
    asked = {prompt.prompt_id for prompt in prompts}
    return [answer for answer in known if answer.prompt_id in asked]


def _longest(known: Sequence[SampledAnswer]) -> dict[str, SampledAnswer]:
    best: dict[str, SampledAnswer] = {}
    for answer in known:
        rival = best.get(answer.prompt_id)
        if answer.complied and (rival is None or answer.num_tokens > rival.num_tokens):
            best[answer.prompt_id] = answer
    return best


def _sample(
    source: LoadedModel,
    prompts: Sequence[Prompt],
    number: int,
    sampling: Sampling,
    system: str | None,
    seed: int,
    site: Site,
) -> Iterator[SampledAnswer]:
    jobs = []
    for prompt in prompts:
        key = Key(prompt_id=prompt.prompt_id, attack="answer", variant=f"round={number}", sample=0)
        ids = render(source.tokenizer, source.template, conversation(prompt.text, system), site=site).ids
        jobs.append(Job(ids=ids, sampling=sampling, seed=row_seed(seed, key, "base")))
    stops = stop_ids(source.tokenizer, source.model.generation_config)
    judge = get_judge("refusal")
    for made in generate(source.model, jobs, stop_ids=stops):
        text = source.tokenizer.decode(made.token_ids, skip_special_tokens=True)
        prompt = prompts[made.index]
        (ruling,) = judge.judge([JudgeInput(prompt=prompt.text, response=text)])
        yield SampledAnswer(
            prompt_id=prompt.prompt_id,
            round=number,
            model=source.name,
            text=text,
            num_tokens=len(answer_ids(source.tokenizer, text)),
            complied=ruling.status == "complied" and ruling.refusal_char is None,
            refused=ruling.outcome == "refused_at_once",
            token_ids=made.token_ids,
            finish=made.finish,
        )
