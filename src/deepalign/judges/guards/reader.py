"""A guard model at work: prompts to what it writes, or to how probable its answers are.

Token ids in, texts or probabilities out, in the given order. What does not fit the model's context or memory comes
back with a problem instead. Knows no format and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepalign.batching import Job, in_halves
from deepalign.chat import ChatTemplate, answer_ids, render, stop_ids
from deepalign.generation import evaluation_mode, generate
from deepalign.heads import Reader as LogitReader
from deepalign.heads import chosen_probabilities, logit_reader, padded, vocabulary_size
from deepalign.models import LoadedModel
from deepalign.records import Message, Sampling

Ids = tuple[int, ...]
_PROBE_IDS = 16
_LOGIT_BYTES = 4 * 2**30
_SPACES = ("", "\u2581", "\u0120")
"""How vocabularies mark a space before a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the model wrote."""

    text: str = ""
    ids: Ids = ()
    problem: str = ""
    """Why there is no text, when there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """How probable each answer was as the next token."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Probability by answer, over the whole vocabulary; they need not sum to 1."""
    problem: str = ""

    def share(self, answer: str) -> float:
        """Probability of one answer among the given ones."""
        return self.shares[answer] / self.total

    @property
    def total(self) -> float:
        """How much of the probability is on the given answers."""
        return sum(self.shares.values())


class Reader:
    """Runs a guard model over many prompts."""

    def __init__(self, loaded: LoadedModel, *, max_batch: int = 32) -> None:
        """Hold the model.

        Args:
            loaded: The model and its tokenizer.
            max_batch: Most prompts at a time; memory may allow fewer.
        """
        self._loaded = loaded
        self._max_batch = max_batch
        self._logits: LogitReader | None = None

    @property
    def model(self) -> Any:
        """The model itself; the reader's own, loaded for nobody else."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def render(self, template: ChatTemplate, messages: Sequence[Message]) -> Ids:
        """Prompt ids; control tokens in a message are plain text there."""
        return render(self.tokenizer, template, messages).ids

    def clipped(self, text: str, limit: int) -> str:
        """The first `limit` tokens of a text, the text itself where it has no more."""
        ids = answer_ids(self.tokenizer, text)
        if len(ids) <= limit:
            return text
        # A cut may leave half a character.
        return str(self.tokenizer.decode(ids[:limit])).rstrip("\ufffd")

    def write(self, prompts: Sequence[Ids], *, max_new_tokens: int, keep_control: bool = False) -> list[Reply]:
        """Greedy continuations.

        Args:
            prompts: Token ids.
            max_new_tokens: Most tokens of each.
            keep_control: Whether control tokens stay in the text.
        """
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens)
        jobs = [Job(ids=ids, sampling=sampling, seed=0) for ids in prompts]
        stops = stop_ids(self.tokenizer, getattr(self._loaded.model, "generation_config", None))
        replies = [Reply(problem="not read")] * len(prompts)
        for done in generate(self._loaded.model, jobs, stop_ids=stops, max_batch=self._max_batch):
            text = self.tokenizer.decode(done.token_ids, skip_special_tokens=not keep_control)
            failed = done.reason if done.status == "failed" else ""
            replies[done.index] = Reply(text=text, ids=done.token_ids, problem=failed)
        return replies

    def weigh(self, prompts: Sequence[Ids], answers: Mapping[str, Sequence[str]]) -> list[Weighed]:
        """Probabilities of the next token.

        Args:
            prompts: Token ids.
            answers: For each answer, the vocabulary entries that mean it.
        """
        entries = {answer: self._entries(pieces) for answer, pieces in answers.items()}
        results = [Weighed(problem=self._too_long(ids)) for ids in prompts]
        fitting = [index for index, result in enumerate(results) if not result.problem]
        fitting.sort(key=lambda index: len(prompts[index]))
        for part in self._parts(fitting, prompts):
            done = in_halves(
                lambda few: self._weighed([prompts[index] for index in few], entries),
                part,
                lambda _: Weighed(problem="out of memory, even alone"),
            )
            for index, result in zip(part, done, strict=True):
                results[index] = result
        return results

    def _parts(self, order: Sequence[int], prompts: Sequence[Ids]) -> Iterator[list[int]]:
        """Batches of prompts by length, small enough for logits at every position: not all heads can be sliced."""
        bytes_each = vocabulary_size(self.model) * int(self.model.dtype.itemsize)
        part: list[int] = []
        for index in order:
            full = len(part) >= self._max_batch
            if part and (full or (len(part) + 1) * len(prompts[index]) * bytes_each > _LOGIT_BYTES):
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _weighed(self, prompts: Sequence[Ids], entries: Mapping[str, list[int]]) -> list[Weighed]:
        model = self._loaded.model
        flat = [entry for group in entries.values() for entry in group]
        with torch.inference_mode(), evaluation_mode(model):
            if self._logits is None:
                self._logits = logit_reader(model, prompts[0][:_PROBE_IDS])
            last = [slice(len(ids) - 1, len(ids)) for ids in prompts]
            source = self._logits(padded(model, prompts), last)
            table_NK = chosen_probabilities(source, vocabulary_size(model), flat)
        rows: list[Weighed] = []
        for row in table_NK.tolist():
            shares, start = {}, 0
            for answer, group in entries.items():
                shares[answer] = sum(row[start : start + len(group)])
                start += len(group)
            finite = all(0.0 <= share < float("inf") for share in shares.values())
            rows.append(Weighed(shares=shares) if finite else Weighed(problem="non-finite logits"))
        return rows

    def _entries(self, pieces: Sequence[str]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        found = sorted({vocabulary[piece] for piece in pieces if piece in vocabulary})
        if not found:
            raise ValueError(f"the judge's vocabulary has no token for {pieces[0]!r}; is it another model's tokenizer?")
        return found

    def _too_long(self, ids: Ids) -> str:
        limit = getattr(self._loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return f"{len(ids)} input tokens exceed the judge's {limit}" if limit is not None and len(ids) > limit else ""


def spaced(*words: str) -> tuple[str, ...]:
    """Vocabulary entries of words with and without a space before them."""
    return tuple(mark + word for word in words for mark in _SPACES)
