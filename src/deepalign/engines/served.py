"""The engine `openai`: servers that hold the model, over HTTP; each answer is checked against the ids that it is for.

Owns what becomes of an answer: which ids were written, where they end, and what makes it a failure. How servers are
asked is in `dialects.py`, whether they do what they are asked in `trial.py`, and connections in `endpoints`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deepalign.batching import Continuation, Job
from deepalign.chat import answer_ids
from deepalign.endpoints.client import Client
from deepalign.endpoints.exchange import Reply, Request
from deepalign.engines.dialects import Chat, Dialect, Told

_WAVE = 2048
"""Requests that lie in memory at a time."""

logger = logging.getLogger("deepalign")


class ServedEngine:
    """Servers that all hold one model."""

    def __init__(
        self,
        client: Client,
        dialect: Dialect,
        tokenizer: Any,
        *,
        model: str,
        facts: dict[str, Any] | None = None,
        logprobs: bool = False,
    ) -> None:
        """Keep the settings; `trial.open_engine` finds them out.

        Args:
            client: Sends to the servers.
            dialect: How they are asked.
            tokenizer: The model's.
            model: Its name on the servers.
            facts: What the trial found, for the manifest.
            logprobs: Whether continuations carry the log-probabilities of their tokens.
        """
        self._client = client
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._model = model
        self._logprobs = logprobs
        self.facts = facts or {}

    @property
    def identity(self) -> dict[str, Any]:
        """Which model answers, and how it is asked."""
        return {"engine": "openai", "served_model": self._model, "served_by": self._dialect.name}

    def complete(self, jobs: Sequence[Job], *, stop_ids: Sequence[int]) -> Iterator[Continuation]:
        """Continue every job; what a server cannot do, or did otherwise than asked, is a failure with its reason.

        Raises:
            ServersGoneError: No server is left; what was written before has been yielded.
        """
        # Jobs with a common beginning next to each other, so that a server's cache still holds it.
        order = sorted(range(len(jobs)), key=lambda index: _beginning(jobs[index]))
        for start in range(0, len(order), _WAVE):
            again: list[int] = []
            for index, reply in self._send(jobs, order[start : start + _WAVE], stop_ids):
                if reply.gave_up:
                    again.append(index)
                else:
                    yield self.continuation(index, jobs[index], reply, stop_ids)
            # A failure is for good, in a run. What a server gave no answer to is asked once more when the others are
            # done; and if by then no server is left, it stays open for the run that goes on.
            for index, reply in self._send(jobs, again, stop_ids):
                yield self.continuation(index, jobs[index], reply, stop_ids)

    def _send(self, jobs: Sequence[Job], part: Sequence[int], stop_ids: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Replies to some of the jobs, with the index of each."""
        for place, reply in self._client.send([self.request(jobs[index], stop_ids) for index in part]):
            yield part[place], reply

    def request(self, job: Job, stop_ids: Sequence[int]) -> Request:
        """A job as it is sent."""
        body = self._dialect.body(job, stop_ids, logprobs=self._logprobs)
        return Request(path=self._dialect.path, body=body, prefix=_name_of(_beginning(job)))

    def continuation(self, index: int, job: Job, reply: Reply, stop_ids: Sequence[int]) -> Continuation:
        """What a reply says was written."""
        if reply.status == "failed":
            return Continuation(index=index, status="failed", reason=reply.reason)
        try:
            told = self._dialect.read(reply.body)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return Continuation(index=index, status="failed", reason=f"the server's answer cannot be read: {error}")
        problem = misread(job, told) or ("" if told.finish else f"the server ended with {told.ended!r}")
        if problem:
            return Continuation(index=index, status="failed", reason=problem)
        return replace(written(self._dialect, self._tokenizer, job, told, stop_ids), index=index)


def misread(job: Job, told: Told) -> str:
    """What is wrong with what a server read; "" for nothing, as far as it tells."""
    if told.prompt_ids is not None and told.prompt_ids != job.ids:
        return f"the server read other ids than the {len(job.ids)} it was to go on from"
    if told.num_prompt is not None and told.num_prompt != len(job.ids):
        return f"the server read {told.num_prompt} tokens where there are {len(job.ids)} to go on from"
    return ""


def written(dialect: Dialect, tokenizer: Any, job: Job, told: Told, stop_ids: Sequence[int]) -> Continuation:
    """The ids that a server wrote: its own where it gives them, else its text's, and then a note where they differ."""
    note = ""
    ids = told.token_ids
    if ids is None:
        ids = answer_ids(tokenizer, own_text(dialect, job, told.text))
        # A stop token may be counted, and has no text.
        if told.num_written is not None and told.num_written - len(ids) not in (0, 1 if told.finish == "stop" else 0):
            note = f"ids are those of the text, {len(ids)}; the server wrote {told.num_written}"
    stops = set(stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    # A text may take more ids than it was written in; none of it is cut off.
    most = job.sampling.max_new_tokens if told.token_ids is not None else end
    finish = "stop" if end < len(ids) else told.finish
    logprobs = told.logprobs[:end] if told.token_ids is not None else ()
    return Continuation(
        index=0, status="ok", token_ids=ids[: min(end, most)], finish=finish, logprobs=logprobs, note=note
    )


def own_text(dialect: Dialect, job: Job, text: str) -> str:
    """What a server wrote, without the prefill that it may repeat."""
    if isinstance(dialect, Chat) and dialect.repeats:
        return text.removeprefix(dialect.prefill(job))
    return text


def _beginning(job: Job) -> tuple[int, ...]:
    """What jobs that differ only in their prefill share."""
    return job.ids[: len(job.ids) - job.num_prefill]


def _name_of(ids: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
