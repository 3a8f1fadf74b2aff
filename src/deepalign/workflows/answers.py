"""Reference answers for prompts that have none: sampled from an unaligned model, kept in the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepalign.attacks import row_seed
from deepalign.chat import answer_ids, conversation, render, stop_ids
from deepalign.generation import Job, generate
from deepalign.judges import get_judge
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.prompts.sources import with_answers
from deepalign.records import JudgeInput, Key, Prompt, Sampling
from deepalign.runs import RunFolder

FILE = "answers.jsonl"
ROUNDS = 4
_SPARE_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAnswer:
    """What the answering model wrote for one prompt in one round."""

    prompt_id: str
    round: int
    model: str
    text: str
    num_tokens: int
    """Length in the answering model's own tokens."""
    complied: bool
    """Whether the rule-based judge takes it for an answer."""


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
    missing = [prompt for prompt in prompts if prompt.answer is None]
    if not missing:
        return tuple(prompts)
    known = run.records(FILE, SampledAnswer)
    with run.appender(FILE) as out:
        for number in range(rounds):
            open_ids = {prompt.prompt_id for prompt in missing} - _settled(known, least_tokens)
            tried = {answer.prompt_id for answer in known if answer.round == number}
            todo = [prompt for prompt in missing if prompt.prompt_id in open_ids - tried]
            for count, answer in enumerate(_sample(source, todo, number, least_tokens, system_prompt, seed), start=1):
                out.append([answer])
                known.append(answer)
                progress("sampling answers", len(missing) - len(todo) + count, len(missing))
    return with_answers(prompts, _best(known))


def _settled(known: Sequence[SampledAnswer], least_tokens: int) -> set[str]:
    return {answer.prompt_id for answer in known if answer.complied and answer.num_tokens >= least_tokens}


def _best(known: Sequence[SampledAnswer]) -> dict[str, str]:
    best: dict[str, SampledAnswer] = {}
    for answer in known:
        rival = best.get(answer.prompt_id)
        if answer.complied and (rival is None or answer.num_tokens > rival.num_tokens):
            best[answer.prompt_id] = answer
    return {prompt_id: answer.text for prompt_id, answer in best.items()}


def _sample(
    source: LoadedModel, prompts: Sequence[Prompt], number: int, least_tokens: int, system: str | None, seed: int
) -> Iterator[SampledAnswer]:
    sampling = Sampling(max_new_tokens=least_tokens + _SPARE_TOKENS)
    jobs = []
    for prompt in prompts:
        key = Key(prompt_id=prompt.prompt_id, attack="answer", variant=f"round={number}", sample=0)
        ids = render(source.tokenizer, source.template, conversation(prompt.text, system)).ids
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
        )
