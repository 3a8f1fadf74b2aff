"""One audit in several parts: which prompts a part takes, what it is called, and how a launcher names it.

A shard takes prompts, never single attempts, so that what is read or sampled once for a prompt is done in one place.
Which ones follows from the prompts alone: not from their order, the machine or the time. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deepalign.errors import UserError

AUTO = "auto"
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
"""Rank, their number and the rank on its machine: of torchrun and accelerate, and of srun."""
_FOLDER = re.compile(r"(?P<whole>.+)-shard-\d+-of-\d+")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One of several parts; the first is 1."""

    index: int
    count: int
    local: int | None = None
    """Which process of its machine this is, where a launcher says so: it picks the GPU."""
    together: bool = False
    """Whether all parts were launched as one job, so that the first can wait for the others and merge them."""

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def folder(self, whole: Path) -> Path:
        """The part's run folder, beside the whole run's."""
        return whole.with_name(f"{whole.name}-shard-{self.index}-of-{self.count}")

    def all(self) -> tuple[Shard, ...]:
        """Every part, in order."""
        return tuple(Shard(index=index, count=self.count) for index in range(1, self.count + 1))

    def share(self, items: Sequence[Item], names: Sequence[str], before: int = 0) -> tuple[Item, ...]:
        """The items of this part, in their order.

        They are dealt in the order of a hash of their names: parts differ by one item at most, and the order in which a
        file lists its rows does not matter.

        Args:
            items: What to deal.
            names: What each item is, in words that no other has.
            before: Items of other lists that were dealt before, so that the odd ones do not all go to the first part.
        """
        dealt = sorted(range(len(items)), key=lambda place: hashlib.sha256(names[place].encode()).digest())
        mine = {place for turn, place in enumerate(dealt, start=before) if turn % self.count == self.index - 1}
        return tuple(item for place, item in enumerate(items) if place in mine)


def whole_folder(shard: Path) -> Path | None:
    """The whole run's folder, from the name that a part was given; None where it has another name."""
    match = _FOLDER.fullmatch(shard.name)
    return shard.with_name(match["whole"]) if match else None


def parse_shard(text: str) -> Shard:
    """Read "2/4", the second of four.

    Raises:
        UserError: It is no such thing.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise UserError(f"--shard {text!r} is neither I/N, such as 1/4 for the first of four, nor {AUTO}")
    index, count = int(match[1]), int(match[2])
    if not 1 <= index <= count:
        raise UserError(f"--shard {text}: shards are counted from 1, so that the last one here is {count}/{count}")
    return Shard(index=index, count=count)


def chosen_shard(text: str | None, environment: Mapping[str, str]) -> Shard | None:
    """The shard that the settings name; for "auto" the one that a launcher gave this process; None for the whole.

    Raises:
        UserError: There is no launcher, or what it says makes no shard.
    """
    if text is None:
        return None
    if text != AUTO:
        return parse_shard(text)
    alone = False
    for rank, size, local in _LAUNCHERS:
        if rank in environment and size in environment:
            index, count = _number(environment, rank), _number(environment, size)
            if count > 1:
                near = _number(environment, local) if local in environment else None
                return _checked(Shard(index=index + 1, count=count, local=near, together=True), f"{rank}={index}")
            alone = True
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _of_array(environment)
    if alone:
        return None
    raise UserError(
        f"--shard {AUTO} finds no process number: neither torchrun nor accelerate (RANK), srun (SLURM_PROCID) or a "
        "SLURM array (SLURM_ARRAY_TASK_ID) started this; give the shard, such as --shard 1/4"
    )


def _of_array(environment: Mapping[str, str]) -> Shard:
    number, count = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    told = f"SLURM_ARRAY_TASK_ID={number}, _COUNT={count}"
    if count == 1:
        # One task that is handed in again would otherwise take itself for the whole.
        raise UserError(f"--shard {AUTO} with {told}: an array of one task; give the shard, such as --shard 4/32")
    return _checked(Shard(index=(number - first) // step + 1, count=count), told)


def _checked(shard: Shard, told: str) -> Shard:
    if not 1 <= shard.index <= shard.count:
        raise UserError(f"--shard {AUTO}: {told} is none of {shard.count} parts; give the shard, such as --shard 1/4")
    return shard


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if re.fullmatch(r"\d{1,6}", text) is None:
        raise UserError(f"--shard {AUTO}: {name}={text!r} is not a number; give the shard, such as --shard 1/4")
    return int(text)
