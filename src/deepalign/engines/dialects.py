"""How a job is put to each kind of server, and how its answer is read: three dialects of one protocol.

`completion`: llama.cpp's own path, ids in and ids out. `completions`: the OpenAI path with a prompt of ids, as vLLM and
SGLang take it; ids come back where the server gives them, else its text. `chat`: messages, the last of them the
assistant's, which the server is asked to continue; text in and text out. Every setting of the sampler is sent, since
servers have defaults of their own (vLLM those of the model, llama.cpp a min-p of 0.05).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from deepalign.batching import Job

_SEED_BITS = 0x7FFF_FFFF
"""Seeds are 64 bits here; llama.cpp takes 32, and some servers only positive ones."""
_LENGTH, _STOP = ("length", "limit", "max_tokens"), ("stop", "eos", "word", "eos_token", "stop_sequence", "end_turn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a server says of one job."""

    text: str
    finish: Literal["stop", "length", ""]
    """"" for an end of another kind, which `ended` names."""
    ended: str
    token_ids: tuple[int, ...] | None = None
    """None where it gives text only."""
    logprobs: tuple[float, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    """What it read; None where it does not say."""
    num_prompt: int | None = None
    num_written: int | None = None


class Dialect(Protocol):
    """One way of asking."""

    @property
    def name(self) -> str:
        """As it stands in the manifest."""
        ...

    @property
    def path(self) -> str:
        """Below a server's address; beside its version where it begins with a slash."""
        ...

    @property
    def takes_ids(self) -> bool:
        """Whether ids are sent, and not text."""
        ...

    def body(self, job: Job, stop_ids: Sequence[int], *, logprobs: bool) -> dict[str, Any]:
        """The request's JSON."""
        ...

    def read(self, body: Mapping[str, Any]) -> Told:
        """What the answer's JSON says; raises `ValueError` where it is not of this form."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """llama.cpp's own `/completion`."""

    name: str = "completion"
    path: str = "/completion"
    takes_ids: bool = True

    def body(self, job: Job, stop_ids: Sequence[int], *, logprobs: bool) -> dict[str, Any]:
        """The request's JSON; temperature before the cuts, as `transformers` and vLLM have it."""
        sampling = job.sampling
        return {
            "prompt": list(job.ids),
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "dry_multiplier": 0.0,
            "xtc_probability": 0.0,
            "samplers": ["temperature", "top_k", "top_p"],
            "seed": job.seed & _SEED_BITS,
            "cache_prompt": True,
            "return_tokens": True,
            **({"n_probs": 1} if logprobs else {}),
        }

    def read(self, body: Mapping[str, Any]) -> Told:
        """What the answer's JSON says."""
        ids = _ids(body.get("tokens"))
        if ids is None or not isinstance(body.get("content"), str):
            raise ValueError("it holds no tokens")
        steps = body.get("completion_probabilities")
        logprobs = [step.get("logprob") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
        ended = "cut off" if body.get("truncated") else str(body.get("stop_type", ""))
        return Told(
            text=body["content"],
            token_ids=ids,
            finish=_finish(ended),
            ended=ended,
            logprobs=_numbers(logprobs),
            num_prompt=_count(body.get("tokens_evaluated")),
            num_written=_count(body.get("tokens_predicted")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """The OpenAI path `completions`, with a prompt of ids."""

    name: str = "completions"
    path: str = "completions"
    takes_ids: bool = True
    extras: bool = True
    """Whether the server takes what the OpenAI protocol does not have: top-k, stop ids, ids in the answer."""

    def body(self, job: Job, stop_ids: Sequence[int], *, logprobs: bool) -> dict[str, Any]:
        """The request's JSON."""
        return {
            "prompt": list(job.ids),
            "stream": False,
            **_common(job),
            **(_extras(job, stop_ids) if self.extras else {}),
            **({"logprobs": 1} if logprobs else {}),
        }

    def read(self, body: Mapping[str, Any]) -> Told:
        """What the answer's JSON says."""
        choice = body["choices"][0]
        if not isinstance(choice.get("text"), str):
            raise ValueError("it holds no text")
        found = choice.get("logprobs")
        noted = found.get("token_logprobs") if isinstance(found, dict) else None
        return _told(body, choice, choice["text"], noted if isinstance(noted, list) else [])


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """The OpenAI path `chat/completions`, with the assistant's message to be continued."""

    decode: Callable[[Sequence[int]], str]
    name: str = "chat"
    path: str = "chat/completions"
    takes_ids: bool = False
    extras: bool = True
    repeats: bool = False
    """Whether the server's text begins with the prefill, as llama.cpp's once did."""

    def body(self, job: Job, stop_ids: Sequence[int], *, logprobs: bool) -> dict[str, Any]:
        """The request's JSON."""
        messages = [{"role": turn.role, "content": turn.content} for turn in job.messages]
        prefill = self.prefill(job)
        if prefill:
            messages.append({"role": "assistant", "content": prefill})
        flags = {"add_generation_prompt": not prefill, "continue_final_message": bool(prefill)}
        return {
            "messages": messages,
            "stream": False,
            **_common(job),
            **({**flags, **_extras(job, stop_ids)} if self.extras else {}),
            **({"logprobs": True} if logprobs else {}),
        }

    def prefill(self, job: Job) -> str:
        """The text that the assistant is made to have written."""
        return self.decode(job.ids[len(job.ids) - job.num_prefill :]) if job.num_prefill else ""

    def read(self, body: Mapping[str, Any]) -> Told:
        """What the answer's JSON says."""
        choice = body["choices"][0]
        message = choice.get("message")
        if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
            raise ValueError("it holds no message")
        if message.get("reasoning_content") or message.get("reasoning"):
            raise ValueError("the server took thoughts out of the text; start it without a reasoning parser")
        found = choice.get("logprobs")
        steps = found.get("content") if isinstance(found, dict) else None
        noted = [step.get("logprob") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
        return _told(body, choice, message.get("content") or "", noted)


def _common(job: Job) -> dict[str, Any]:
    sampling = job.sampling
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": job.seed & _SEED_BITS,
    }


def _extras(job: Job, stop_ids: Sequence[int]) -> dict[str, Any]:
    return {
        # 0 is off in vLLM and llama.cpp, but no number of tokens to SGLang and older versions.
        "top_k": job.sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
    }


def _told(body: Mapping[str, Any], choice: Mapping[str, Any], text: str, logprobs: Sequence[Any]) -> Told:
    usage = body.get("usage")
    counts: Mapping[str, Any] = usage if isinstance(usage, dict) else {}
    prompt_ids = _ids(choice.get("prompt_token_ids"))
    ended = str(choice.get("finish_reason") or "")
    return Told(
        text=text,
        token_ids=_ids(choice.get("token_ids")),
        finish=_finish(ended),
        ended=ended,
        logprobs=_numbers(logprobs),
        prompt_ids=_ids(body.get("prompt_token_ids")) if prompt_ids is None else prompt_ids,
        num_prompt=_count(counts.get("prompt_tokens")),
        num_written=_count(counts.get("completion_tokens")),
    )


def _finish(ended: str) -> Literal["stop", "length", ""]:
    return "length" if ended in _LENGTH else "stop" if ended in _STOP else ""


def _ids(value: Any) -> tuple[int, ...] | None:
    """A list of ids, also an empty one; None for anything else."""
    whole = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    return tuple(value) if whole else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    """Numbers, all of them; none where one is missing."""
    return tuple(float(one) for one in values) if all(isinstance(one, int | float) for one in values) else ()
