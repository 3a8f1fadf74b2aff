"""The named steps between two files of a run: attempts -> completions -> verdicts, and answers -> KL profiles.

Each reads what is there, does what is missing, and appends; so each can be killed and started again at any point.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from deepalign.chat import answer_ids, conversation, render, stop_ids
from deepalign.depth import KlProfile, check_vocabularies, kl_profiles
from deepalign.generation import Continuation, Job, generate
from deepalign.judges import Judge
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent
from deepalign.records import Attempt, Completion, JudgeInput, Prompt, Ruling, Verdict
from deepalign.runs import RunFolder

ATTEMPTS, COMPLETIONS, KL = "attempts.jsonl", "completions.jsonl", "kl.jsonl"
_JUDGE_BATCH = 64


def complete(
    run: RunFolder,
    loaded: LoadedModel,
    attempts: Sequence[Attempt],
    *,
    stage: str,
    max_batch: int,
    progress: Progress = silent,
) -> None:
    """Generate the completions that are missing, each appended as soon as it is finished."""
    done = {completion.key for completion in run.records(COMPLETIONS, Completion)}
    todo = [attempt for attempt in attempts if attempt.key not in done]
    progress(stage, len(attempts) - len(todo), len(attempts))
    if not todo:
        return
    jobs = [
        Job(
            ids=render(loaded.tokenizer, loaded.template, attempt.messages, attempt.prefill_ids).ids,
            sampling=attempt.sampling,
            seed=attempt.seed,
        )
        for attempt in todo
    ]
    stops = stop_ids(loaded.tokenizer, loaded.model.generation_config)
    made = len(attempts) - len(todo)
    with run.appender(COMPLETIONS) as out:
        for continuation in generate(loaded.model, jobs, stop_ids=stops, max_batch=max_batch):
            attempt, job = todo[continuation.index], jobs[continuation.index]
            out.append([to_completion(loaded.tokenizer, attempt, len(job.ids), continuation)])
            made += 1
            progress(stage, made, len(attempts))


def to_completion(tokenizer: Any, attempt: Attempt, num_input: int, continuation: Continuation) -> Completion:
    """A continuation as a record, decoded after its prefill so that no leading space is lost."""
    before = tokenizer.decode(attempt.prefill_ids, skip_special_tokens=True)
    ends = [
        len(
            _after(
                before,
                tokenizer.decode((*attempt.prefill_ids, *continuation.token_ids[:count]), skip_special_tokens=True),
            )
        )
        for count in range(1, len(continuation.token_ids) + 1)
    ]
    whole = tokenizer.decode((*attempt.prefill_ids, *continuation.token_ids), skip_special_tokens=True)
    return Completion(
        prompt_id=attempt.prompt_id,
        attack=attempt.attack,
        variant=attempt.variant,
        sample=attempt.sample,
        status=continuation.status,
        text=_after(before, whole),
        token_ids=continuation.token_ids,
        char_ends=tuple(ends),
        finish=continuation.finish,
        num_input_tokens=num_input,
        reason=continuation.reason,
    )


def _after(before: str, whole: str) -> str:
    """What `whole` adds to `before`; a character split over the border (U+FFFD in `before`) belongs to the addition."""
    kept = before.rstrip("�")
    return whole[len(kept) :] if whole.startswith(kept) else whole[len(before) :]


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
    verdicts = [verdict for verdict in run.records(name, Verdict) if verdict.key in by_key]
    done = {verdict.key for verdict in verdicts}
    completions = [c for c in run.records(COMPLETIONS, Completion) if c.key in by_key]
    todo = [completion for completion in completions if completion.key not in done]
    progress("judging", len(done), len(completions))
    with run.appender(name) as out:
        for start in range(0, len(todo), _JUDGE_BATCH):
            part = todo[start : start + _JUDGE_BATCH]
            fresh = judge_batch(judge, [(by_key[completion.key], completion) for completion in part])
            out.append(fresh)
            verdicts += fresh
            progress("judging", len(done) + start + len(part), len(completions))
    return verdicts


def judge_batch(judge: Judge, pairs: Sequence[tuple[Attempt, Completion]]) -> list[Verdict]:
    """Verdicts on completions, alone and with their prefill; whatever fails is unscored with its reason."""
    alone = _rulings(judge, [_seen(attempt, completion.text) for attempt, completion in pairs])
    joined = _rulings(judge, [_seen(attempt, attempt.prefill_text + completion.text) for attempt, completion in pairs])
    verdicts = []
    for (attempt, completion), one, both in zip(pairs, alone, joined, strict=True):
        if completion.status == "failed":
            one = both = Ruling(status="unscored", outcome="unscored", reason=completion.reason)
        verdicts.append(
            Verdict(
                prompt_id=attempt.prompt_id,
                attack=attempt.attack,
                variant=attempt.variant,
                sample=attempt.sample,
                judge=judge.name,
                status=one.status,
                outcome=one.outcome,
                reason=one.reason,
                refusal_position=_position(attempt, completion, one.refusal_char),
                status_with_prefix=both.status,
                outcome_with_prefix=both.outcome,
                reason_with_prefix=both.reason,
            )
        )
    return verdicts


def _seen(attempt: Attempt, response: str) -> JudgeInput:
    return JudgeInput(prompt=attempt.messages[-1].content, response=response)


def _rulings(judge: Judge, items: Sequence[JudgeInput]) -> list[Ruling]:
    try:
        rulings = judge.judge(items)
    except Exception as error:
        # A judge may be anybody's code; its failure is data, never a lost run.
        reason = f"the judge failed: {type(error).__name__}: {error}"[:200]
        return [Ruling(status="unscored", outcome="unscored", reason=reason) for _ in items]
    if len(rulings) != len(items):
        reason = f"the judge gave {len(rulings)} rulings for {len(items)} texts"
        return [Ruling(status="unscored", outcome="unscored", reason=reason) for _ in items]
    return list(rulings)


def _position(attempt: Attempt, completion: Completion, refusal_char: int | None) -> int | None:
    """Response position of the token that holds a character of the completion."""
    if refusal_char is None:
        return None
    inside = bisect_right(completion.char_ends, refusal_char)
    return len(attempt.prefill_ids) + min(inside, max(0, len(completion.token_ids) - 1))


def measure_kl(
    run: RunFolder,
    target: LoadedModel,
    base: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None,
    max_positions: int,
    progress: Progress = silent,
) -> list[KlProfile]:
    """KL profiles of every prompt with an answer, those that are missing appended."""
    vocab_size = check_vocabularies(target, base)
    profiles = run.records(KL, KlProfile)
    done = {profile.prompt_id for profile in profiles}
    usable = [prompt for prompt in prompts if prompt.answer]
    items = [
        (
            prompt.prompt_id,
            render(
                target.tokenizer,
                target.template,
                conversation(prompt.text, system_prompt),
                answer_ids(target.tokenizer, prompt.answer or "")[:max_positions],
            ),
        )
        for prompt in usable
        if prompt.prompt_id not in done
    ]
    progress("measuring KL", len(usable) - len(items), len(usable))
    with run.appender(KL) as out:
        for profile in kl_profiles(target.model, base.model, items, vocab_size=vocab_size, max_positions=max_positions):
            out.append([profile])
            profiles.append(profile)
            progress("measuring KL", len(profiles), len(usable))
    return profiles
