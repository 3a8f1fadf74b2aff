"""The named steps between two files of a run: attempts -> completions -> verdicts, and answers -> KL profiles.

Each reads what is there, does what is missing, and appends; so each can be killed and started again at any point.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from deepalign.batching import Continuation, Job
from deepalign.chat import render, stop_ids, thought_markers
from deepalign.depth import KlProfile, check_vocabularies, kl_profiles
from deepalign.engines import Engine
from deepalign.engines.in_process import in_process
from deepalign.judges import Judge
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.readers import Reads
from deepalign.records import Attempt, Completion, Prompt, Site, Verdict
from deepalign.runs import RunFolder
from deepalign.text_ends import added_text
from deepalign.thinking import Markers, Split, split_thoughts
from deepalign.workflows.along import AlongAnswers, Forced
from deepalign.workflows.judging import batch_of, judged

ATTEMPTS, COMPLETIONS, KL = "attempts.jsonl", "completions.jsonl", "kl.jsonl"
_MOST_JOBS = 4096


def complete(
    run: RunFolder,
    loaded: Reads,
    attempts: Sequence[Attempt],
    *,
    stage: str,
    engine: Engine | None = None,
    max_batch: int | None = None,
    progress: Progress = silent,
) -> None:
    """Generate the completions that are missing, each appended as soon as it is finished.

    Args:
        run: The run's folder.
        loaded: The model that answers; with its weights where no engine holds them.
        attempts: All of them, done or not.
        stage: What the progress bar calls this.
        engine: What generates; default the loaded model in this process.
        max_batch: Most rows at a time in this process.
        progress: Told of each one.
    """
    done = {completion.key for completion in run.stream(COMPLETIONS, Completion)}
    todo = [attempt for attempt in attempts if attempt.key not in done]
    progress(stage, len(attempts) - len(todo), len(attempts))
    if not todo:
        return
    made = len(attempts) - len(todo)
    source = engine or in_process(loaded, max_batch)
    # In parts, so that the ids of all attempts never lie in memory together; each is enough for many full batches.
    size = max(_MOST_JOBS, 16 * (max_batch or 0))
    with run.appender(COMPLETIONS) as out:
        for start in range(0, len(todo), size):
            for completion in completions(loaded, todo[start : start + size], source):
                out.append([completion])
                made += 1
                progress(stage, made, len(attempts))


def completions(loaded: Reads, attempts: Sequence[Attempt], engine: Engine) -> Iterator[Completion]:
    """Each attempt's completion, in the order in which they are finished."""
    jobs = [
        Job(
            ids=render(loaded.tokenizer, loaded.template, attempt.messages, attempt.prefill_ids, attempt.site).ids,
            sampling=attempt.sampling,
            seed=attempt.seed,
            num_prefill=len(attempt.prefill_ids),
            messages=attempt.messages,
        )
        for attempt in attempts
    ]
    stops = stop_ids(loaded.tokenizer, loaded.generation_config)
    marked = thought_markers(loaded.tokenizer, loaded.template)
    for continuation in engine.complete(jobs, stop_ids=stops):
        attempt, job = attempts[continuation.index], jobs[continuation.index]
        yield to_completion(loaded.tokenizer, attempt, len(job.ids), continuation, marked)


def completed(run: RunFolder, attempts: Sequence[Attempt]) -> bool:
    """Whether every attempt has its completion."""
    return {attempt.key for attempt in attempts} <= {one.key for one in run.stream(COMPLETIONS, Completion)}


def to_completion(
    tokenizer: Any, attempt: Attempt, num_input: int, continuation: Continuation, marked: Markers | None = None
) -> Completion:
    """A continuation as a record: thoughts apart, and the answer decoded after its prefill, so that no space is lost.

    Args:
        tokenizer: The model's.
        attempt: What was tried.
        num_input: Tokens that the model read.
        continuation: What it wrote.
        marked: The markers of its thoughts, where it thinks.
    """
    inside = marked is not None and (attempt.site == "reasoning" or (attempt.site == "raw" and marked.starts_open))
    ids = continuation.token_ids
    split = split_thoughts(ids, marked, inside=inside) if marked else Split(first=0, last=0, answer=0, unfinished=False)
    answer = ids[split.answer :]
    lead = () if split.answer or inside else attempt.prefill_ids
    text, ends = added_text(lambda some: str(tokenizer.decode(some, skip_special_tokens=True)), lead, answer)
    return Completion(
        prompt_id=attempt.prompt_id,
        attack=attempt.attack,
        variant=attempt.variant,
        sample=attempt.sample,
        status=continuation.status,
        text=text,
        token_ids=ids,
        char_ends=ends,
        thoughts=tokenizer.decode(ids[split.first : split.last], skip_special_tokens=True),
        num_thought_tokens=split.answer,
        prefill_in_thoughts=inside,
        finish=continuation.finish,
        note=continuation.note,
        num_input_tokens=num_input,
        reason=f"no answer: still thinking after {len(ids)} tokens" if split.unfinished else continuation.reason,
    )


def judge_completions(
    run: RunFolder,
    judge: Judge,
    attempts: Sequence[Attempt],
    *,
    progress: Progress = silent,
) -> list[Verdict]:
    """Verdicts on every completion, those that are missing appended to the judge's own file."""
    name = f"verdicts.{judge.name}.jsonl"
    by_key = {attempt.key: attempt for attempt in attempts}
    verdicts = [verdict for verdict in run.stream(name, Verdict) if verdict.key in by_key]
    done = {verdict.key for verdict in verdicts}
    total = sum(completion.key in by_key for completion in run.stream(COMPLETIONS, Completion))
    # Completions are read again and again rather than held: their text and ids are most of a run.
    todo = (one for one in run.stream(COMPLETIONS, Completion) if one.key in by_key and one.key not in done)
    progress("judging", len(done), total)
    with run.appender(name) as out:
        while part := list(islice(todo, batch_of(judge))):
            for fresh in judged(judge, [(by_key[completion.key], completion) for completion in part]):
                out.append(fresh)
                verdicts += fresh
                progress("judging", len(verdicts), total)
    return verdicts


def measure_kl(
    run: RunFolder,
    target: LoadedModel,
    base: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None,
    max_positions: int,
    site: Site = "raw",
    progress: Progress = silent,
) -> list[KlProfile]:
    """KL profiles of every prompt with an answer, those that are missing appended."""
    vocab_size = check_vocabularies(target, base)

    def measured(items: Sequence[Forced]) -> Iterator[KlProfile]:
        return kl_profiles(target.model, base.model, items, vocab_size=vocab_size, max_positions=max_positions)

    items = AlongAnswers(target, prompts, system_prompt, max_positions, site)
    return items.profiles(run, KL, KlProfile, measured, stage="measuring KL", progress=progress)


@contextmanager
def timed(run: RunFolder, stage: str) -> Iterator[None]:
    """Add a stage's wall-clock seconds to the manifest, over all sittings that reached its end."""
    started = time.monotonic()
    yield
    before = run.manifest.get("seconds", {}).get(stage, 0.0)
    run.note(seconds={stage: round(before + time.monotonic() - started, 1)})
