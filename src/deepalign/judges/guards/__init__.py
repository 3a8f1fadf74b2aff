"""Guard models as judges of harm: a table of formats, each a small file, run by one runner.

On the command line: `NAME`, `NAME:SIZE`, `NAME:ID_OR_FOLDER[@REVISION]`, and after `::` what the format needs besides.
Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepalign.judges.guards.formats import Guard
    from deepalign.judges.guards.runner import GuardJudge

_ALSO = "::"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the table."""

    says: str
    """One line for lists."""
    make: Callable[[str], Guard]
    """Takes what follows "::"."""
    also_base: bool = False
    """Whether what follows "::" is the model below an adapter."""


def _qwen3guard(_: str) -> Guard:
    from deepalign.judges.guards.qwen3guard import Qwen3Guard

    return Qwen3Guard()


def _qwen3guard_strict(_: str) -> Guard:
    from deepalign.judges.guards.qwen3guard import Qwen3Guard

    return Qwen3Guard(strict=True)


GUARDS: dict[str, Entry] = {
    "qwen3guard": Entry(
        says="Qwen3Guard-Gen (0.6b, 4b, 8b): harm and refusal; Controversial is not harm", make=_qwen3guard
    ),
    "qwen3guard-strict": Entry(says="the same, Controversial is harm", make=_qwen3guard_strict),
}


def guard_judge(name: str, spec: str = "") -> GuardJudge:
    """The judge of that name; its weights are fetched where they are not there, and loaded with the first text.

    Args:
        name: A key of `GUARDS`.
        spec: Size, hub id with or without @REVISION, or folder; "" for the pinned default.

    Raises:
        UserError: The weights cannot be had; one line that says where to ask.
    """
    from deepalign.judges.guards.runner import GuardJudge
    from deepalign.judges.guards.sources import find

    entry = GUARDS[name]
    weights, _, also = spec.partition(_ALSO)
    guard = entry.make("" if entry.also_base else also)
    return GuardJudge(guard, find(name, weights, guard.about.sizes, base=also if entry.also_base else ""))
