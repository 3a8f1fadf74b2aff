"""What a search has come to: enough to go on exactly where it stopped, and plain JSON on disk; and what it gave."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from deepalign.errors import UserError
from deepalign.suffix.behaviours import Ids
from deepalign.suffix.proposals import Seen

Stop = Literal["", "matched", "steps", "no candidates"]


@dataclass(kw_only=True, slots=True)
class SearchState:
    """A search between two steps; changed by `search` as it goes on."""

    key: str
    """Names the settings and behaviours that the state belongs to."""
    suffix: Ids
    """What the next step's candidates are made from."""
    loss: float
    """Its loss, the mean over active behaviours."""
    active: int
    """Behaviours that count so far, from the first."""
    best: Ids
    """The suffix with the lowest loss since a behaviour was last taken in."""
    best_loss: float
    step: int = 0
    """Steps done."""
    buffer: list[tuple[float, Ids]] = field(default_factory=list)
    momentum_LH: Tensor | None = None
    """Gradient gathered over the steps, in float32."""
    trace: list[float] = field(default_factory=list)
    """Loss of the suffix that each step led to."""
    seen: Seen = field(default_factory=Seen)
    evaluated: int = 0
    drifted: int = 0
    """Candidates that were left out because their text does not come back as their ids."""
    repeated: int = 0
    """Candidates that were drawn again, and not read again."""
    unread: int = 0
    """Candidates to which the model gave no finite loss, or memory no room."""
    drafted: int = 0
    """Candidates that only a draft model read."""
    barren: int = 0
    """Steps in a row that had no candidate."""
    denied: list[Ids] = field(default_factory=list)
    """Suffixes with which greedy decoding gives every target, but that were not confirmed."""
    stopped: Stop = ""

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps`."""
        momentum = None
        if self.momentum_LH is not None:
            values = self.momentum_LH.contiguous().numpy().astype("<f4").tobytes()
            momentum = {"shape": list(self.momentum_LH.shape), "float32": _packed(values)}
        plain = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("momentum_LH", "seen", "buffer", "denied")
        }
        return {
            **plain,
            "suffix": list(self.suffix),
            "best": list(self.best),
            "buffer": [[loss, list(ids)] for loss, ids in self.buffer],
            "denied": [list(ids) for ids in self.denied],
            "trace": list(self.trace),
            "seen": _packed(self.seen.packed),
            "momentum": momentum,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchState:
        """A state as `to_json` gave it.

        Raises:
            UserError: It is none.
        """
        try:
            fields = dict(data)
            momentum = fields.pop("momentum")
            if momentum is not None:
                values = bytearray(base64.b64decode(momentum["float32"]))
                fields["momentum_LH"] = torch.frombuffer(values, dtype=torch.float32).reshape(momentum["shape"])
            fields["seen"] = Seen(base64.b64decode(fields["seen"]))
            fields["suffix"], fields["best"] = tuple(fields["suffix"]), tuple(fields["best"])
            fields["buffer"] = [(float(loss), tuple(ids)) for loss, ids in fields["buffer"]]
            fields["denied"] = [tuple(ids) for ids in fields["denied"]]
            return cls(**fields)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"this is no state of a suffix search ({error}); delete it to begin anew") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search gave."""

    suffix_ids: Ids
    """The confirmed suffix, else the one with the lowest loss over the active behaviours."""
    text: str
    """What is put behind a prompt and a space."""
    comes_back: bool
    """Whether the text gives these very ids behind every prompt; only then does it stand for what was measured."""
    losses: tuple[float, ...]
    """Its loss for each behaviour, read by itself; those that were not taken in count too."""
    matched: tuple[bool, ...]
    """For which behaviours greedy decoding gives the whole target."""
    active: int
    """Behaviours that were taken in."""
    trace: tuple[float, ...]
    """Loss of the suffix that each step led to, the mean over the behaviours then active."""
    steps: int
    evaluated: int
    drifted: int
    repeated: int
    unread: int
    drafted: int
    denied: int
    """Suffixes that reached every target and were not confirmed."""
    stopped: Stop


def _packed(values: bytes) -> str:
    return base64.b64encode(values).decode("ascii")
