"""Rank-assisted prefilling as a step of a run: attempts -> completions, and how each search went.

Appends to the run's completions, so that judging and metrics know of no difference; `rap.jsonl` holds what only this
attack has to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from deepalign.batching import Continuation
from deepalign.chat import ChatTemplate, Rendered, answer_ids, render, stop_ids, thought_markers
from deepalign.depth import check_vocabularies
from deepalign.errors import UserError, first_line
from deepalign.models import LoadedModel
from deepalign.onset import REFUSAL_OPENINGS
from deepalign.progress import Progress, silent
from deepalign.rank_assisted import TOP, Assisted, EndedBy, Helper, rank_assisted
from deepalign.rank_helpers import BaseHelper, ClassifierHelper, OpeningsHelper
from deepalign.records import Attempt, Completion, Key
from deepalign.runs import RunFolder
from deepalign.workflows.steps import COMPLETIONS, to_completion

SEARCHES = "rap.jsonl"
OPENINGS, BASE = "openings", "base"
_STAGE = "rank-assisted"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRecord:
    """How the search of one attempt went."""

    prompt_id: str
    attack: str
    variant: str
    sample: int
    helper: str
    backtracks: int
    steps: int
    ended_by: EndedBy
    """"exhausted": a step back past the prefill, so that nothing was written; "" for a failure."""

    @property
    def key(self) -> Key:
        """The join key."""
        return Key(prompt_id=self.prompt_id, attack=self.attack, variant=self.variant, sample=self.sample)


def complete_by_rank(
    run: RunFolder,
    loaded: LoadedModel,
    attempts: Sequence[Attempt],
    *,
    helper: str,
    base: LoadedModel | None,
    own: Sequence[Sequence[int]],
    top: int = TOP,
    max_batch: int | None,
    progress: Progress = silent,
) -> None:
    """Search the completions that are missing, each appended as soon as it is finished.

    Args:
        run: The run's folder.
        loaded: The model that answers.
        attempts: Of `rap_plan`; `sampling.max_new_tokens` of each is the most steps of its search.
        helper: "openings", "base", or the folder or hub id of a token classifier.
        base: The model that it was aligned from, for the helper of that name.
        own: Token paths of the model's own refusals, from `own_openings`.
        top: Most probable tokens to choose among.
        max_batch: Most rows at a time.
        progress: Told of each one.

    Raises:
        UserError: The helper cannot be had.
    """
    searched = {record.key for record in run.stream(SEARCHES, SearchRecord)}
    done = {completion.key for completion in run.stream(COMPLETIONS, Completion)}
    todo = [attempt for attempt in attempts if attempt.key not in done]
    made = len(attempts) - len(todo)
    progress(_STAGE, made, len(attempts))
    marked = thought_markers(loaded.tokenizer, loaded.template)
    text_of = token_text(loaded.tokenizer)
    stops = stop_ids(loaded.tokenizer, loaded.model.generation_config)
    for max_steps in sorted({attempt.sampling.max_new_tokens for attempt in todo}):
        part = [attempt for attempt in todo if attempt.sampling.max_new_tokens == max_steps]
        jobs = [_rendered(loaded, attempt) for attempt in part]
        judge = _helper(helper, loaded, base, own, part, max_steps)
        found = rank_assisted(
            loaded.model,
            jobs,
            judge,
            stop_ids=stops,
            text_of=text_of,
            top_k=top,
            max_steps=max_steps,
            max_batch=max_batch,
        )
        with run.appender(SEARCHES) as searches, run.appender(COMPLETIONS) as out:
            for one in found:
                attempt, continuation = part[one.index], _continuation(one, top)
                # First, so that no completion is without it; a killed run may have left it there already.
                if attempt.key not in searched:
                    searches.append([_record(attempt, helper, one)])
                num_input = len(jobs[one.index].ids)
                out.append([to_completion(loaded.tokenizer, attempt, num_input, continuation, marked)])
                made += 1
                progress(_STAGE, made, len(attempts))


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """A token's text, by which repetitions are told; a part of a character is told by its id."""

    @cache
    def text_of(token: int) -> str:
        text = str(tokenizer.decode([token]))
        return f"{text}{token}" if "\ufffd" in text else text

    return text_of


def _rendered(loaded: LoadedModel, attempt: Attempt) -> Rendered:
    return render(loaded.tokenizer, loaded.template, attempt.messages, attempt.prefill_ids, attempt.site)


def _continuation(one: Assisted, top: int) -> Continuation:
    """The search's result as generation would give it; an exhausted one is empty and says why."""
    exhausted = f"no harmful token is left among the top {top}: the search gave up after {one.steps} steps"
    return Continuation(
        index=one.index,
        status=one.status,
        token_ids=one.token_ids,
        finish="stop" if one.ended_by == "stop" else "length" if one.ended_by == "steps" else "",
        reason=exhausted if one.ended_by == "exhausted" else one.reason,
    )


def _record(attempt: Attempt, helper: str, one: Assisted) -> SearchRecord:
    return SearchRecord(
        prompt_id=attempt.prompt_id,
        attack=attempt.attack,
        variant=attempt.variant,
        sample=attempt.sample,
        helper=helper,
        backtracks=one.backtracks,
        steps=one.steps,
        ended_by=one.ended_by,
    )


def _helper(
    name: str,
    loaded: LoadedModel,
    base: LoadedModel | None,
    own: Sequence[Sequence[int]],
    attempts: Sequence[Attempt],
    max_steps: int,
) -> Helper:
    tokenizer = loaded.tokenizer
    if name == OPENINGS:
        named = len(tokenizer)
        return OpeningsHelper(
            [*REFUSAL_OPENINGS, *(tokenizer.decode(list(path)) for path in own)],
            decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            special={*tokenizer.all_special_ids, *_special(tokenizer), *range(named, loaded.vocab_size)},
            stop_ids=stop_ids(tokenizer, loaded.model.generation_config),
        )
    if name == BASE:
        if base is None:
            raise UserError("the helper base needs the model that this one was aligned from; give it, or openings")
        return BaseHelper(base.model, vocab_size=check_vocabularies(loaded, base), max_steps=max_steps)
    classifier, its_tokenizer = _classifier(name)
    return ClassifierHelper(
        classifier.to(loaded.device).eval(),
        encode=lambda text: answer_ids(its_tokenizer, text),
        prompts=[_before_answer(its_tokenizer, attempt) for attempt in attempts],
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
    )


def _special(tokenizer: Any) -> list[int]:
    return [token for token, known in tokenizer.added_tokens_decoder.items() if known.special]


def _classifier(name: str) -> tuple[Any, Any]:
    """A token classifier and its tokenizer; safetensors only, and none of its own code.

    Raises:
        UserError: It cannot be loaded, or tells fewer than two labels apart.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForTokenClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        # transformers and the hub raise many kinds on a name that is none or a folder that is broken.
        raise UserError(
            f"helper {name}: not {OPENINGS} or {BASE}, and not a token classifier in safetensors ({first_line(error)})"
        ) from error
    if report["missing_keys"]:
        # A causal LM would be given a random head.
        raise UserError(
            f"helper {name} has no trained head for tokens ({sorted(report['missing_keys'])[0]} is missing)"
        )
    if model.config.num_labels < 2:
        raise UserError(f"helper {name} has {model.config.num_labels} label; it needs two, of which 1 means harmful")
    return model, tokenizer


def _before_answer(tokenizer: Any, attempt: Attempt) -> Sequence[int]:
    """The prompt as a classifier reads it: through its own chat template, else as a line of its own."""
    template = getattr(tokenizer, "chat_template", None)
    user = [message for message in attempt.messages if message.role == "user"]
    if isinstance(template, str):
        return render(tokenizer, ChatTemplate(text=template, source="helper"), user).ids
    ids = list(tokenizer(f"{user[-1].content}\n")["input_ids"])
    while ids and ids[-1] in tokenizer.all_special_ids:
        ids.pop()
    return ids
