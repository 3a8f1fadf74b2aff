"""What generates: one protocol, token ids in, token ids and their log-probabilities out.

`hf` is the model in this process; `openai:URL` is servers that hold it. Engines know nothing of attacks, runs or
judges; what an attempt looks like in ids is decided before (`chat.py`), so that it is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from deepalign.batching import Continuation, Job


class Engine(Protocol):
    """Continues sequences of token ids."""

    @property
    def identity(self) -> dict[str, Any]:
        """What of the engine decides a run's numbers; a folder is bound to it. JSON values only."""
        ...

    def complete(self, jobs: Sequence[Job], *, stop_ids: Sequence[int]) -> Iterator[Continuation]:
        """Continue every job; yields in the order in which they finish, each job exactly once.

        Args:
            jobs: What to continue.
            stop_ids: Ids that end a row; they are not part of what is written.
        """
        ...
