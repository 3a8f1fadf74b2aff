"""Checkpoints that a stopped run left: which of them are whole, and which to go on from."""

from __future__ import annotations

import json
from pathlib import Path


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a run that was written to its end; None where there is none."""
    numbered = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*")]
    whole = [(int(number), path) for number, path in numbered if number.isdecimal() and is_whole(path)]
    return str(max(whole)[1]) if whole else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
