"""The engine `hf`: the model that this process holds, through `generation.generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepalign.batching import Continuation, Job
from deepalign.generation import generate
from deepalign.models import LoadedModel
from deepalign.readers import Reads


class HfEngine:
    """A `transformers` causal LM in this process."""

    def __init__(self, model: Any, *, max_batch: int | None = None, logprobs: bool = False) -> None:
        """Keep the model; nothing is computed yet.

        Args:
            model: The model; not changed.
            max_batch: Most rows at a time.
            logprobs: Whether continuations carry the log-probabilities of their tokens.
        """
        self._model = model
        self._max_batch = max_batch
        self._logprobs = logprobs

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing beside the model itself."""
        return {"engine": "hf"}

    def complete(self, jobs: Sequence[Job], *, stop_ids: Sequence[int]) -> Iterator[Continuation]:
        """Continue every job, in batches that share the passes over common beginnings."""
        return generate(self._model, jobs, stop_ids=stop_ids, max_batch=self._max_batch, with_logprobs=self._logprobs)


def in_process(model: Reads, max_batch: int | None) -> HfEngine:
    """The engine of a model whose weights this process holds."""
    assert isinstance(model, LoadedModel), f"the weights of {model.name} are not held here"
    return HfEngine(model.model, max_batch=max_batch)
