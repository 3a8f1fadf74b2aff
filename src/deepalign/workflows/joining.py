"""Record files of shards joined into those of the whole run, line by line, so that only keys lie in memory."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.errors import UserError
from deepalign.progress import Progress
from deepalign.runs import RunFolder, write_atomically
from deepalign.shards import Shard
from deepalign.workflows.sharding import Order
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS
from deepalign.workflows.summary import PROMPTS, SKIPPED

_IN_ORDER = (PROMPTS, ATTEMPTS, SKIPPED)
"""Files whose order tables and figures follow; each shard has its own rows in that order already."""
_KEY = ("prompt_id", "attack", "variant", "sample", "round", "k")
Row = tuple[str, dict[str, Any]]
Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One shard's run folder."""

    run: RunFolder
    shard: Shard
    manifest: Mapping[str, Any]

    @property
    def told(self) -> Mapping[str, Any]:
        """What its manifest says of it as a shard."""
        told: Mapping[str, Any] = self.manifest["shard"]
        return told


def join_records(
    run: RunFolder, parts: Sequence[Part], order: Order, judges: Mapping[str, str], progress: Progress
) -> None:
    """Write the record files of the whole run.

    Args:
        run: The whole run's folder.
        parts: The shards.
        order: Of the whole audit.
        judges: Name and version of the judges whose verdicts are wanted; those of other versions are left out, and are
            given again.
        progress: Told of each file.

    Raises:
        UserError: A key is missing or comes twice, or a line cannot be read.
    """
    names = list(dict.fromkeys(name for part in parts for name in part.told["finished"]))
    for number, name in enumerate(names):
        progress("joining", number, len(names))
        paths = [part.run / name for part in parts if (part.run / name).exists()]
        if name in _IN_ORDER:
            rows = heapq.merge(*(_rows(path) for path in paths), key=lambda row: order(row[1]))
        else:
            rows = (row for path in paths for row in _rows(path))
        if _is_shared(paths):
            _copy_shared(run, name, paths)
        else:
            write_atomically(run / name, (line for line, _ in _once(run / name, rows)))
    progress("joining", len(names), len(names))
    for part in parts:
        _check_answered(part)
    _check_prompts(run, order)
    for judge, version in judges.items():
        _join_verdicts(run, parts, judge, version)


def _rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict):
                    raise ValueError(f"not an object but {type(row).__name__}")
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: {error}; delete that line and run that shard's audit again"
                ) from error
            yield line.decode(), row


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is the only one of, in its file."""
    return tuple(row.get(name) for name in _KEY)


def _once(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    seen: set[Key] = set()
    for line, row in rows:
        key = key_of(row)
        if key in seen:
            raise UserError(
                f"{_told(key)} comes twice in the shards' {path.name}: they were not split alike; run one of them anew"
            )
        seen.add(key)
        yield line, row


def _is_shared(paths: Sequence[Path]) -> bool:
    """Whether a file holds what belongs to no prompt, such as suffixes: each shard has all of it."""
    first = next((row for path in paths for _, row in _rows(path)), None)
    return first is not None and "prompt_id" not in first


def _copy_shared(run: RunFolder, name: str, paths: Sequence[Path]) -> None:
    texts = [path.read_bytes() for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if text != texts[0]:
            raise UserError(f"{paths[0]} and {path} differ; every shard needs the same")
    write_atomically(run / name, texts[0])


def _check_answered(part: Part) -> None:
    """Refuse a shard in which an attempt has no completion, or a completion no attempt."""
    attempts, answered = ({key_of(row) for _, row in _rows(part.run / name)} for name in (ATTEMPTS, COMPLETIONS))
    missing, strange = attempts - answered, answered - attempts
    if missing:
        first = _told(min(missing, key=str))
        raise UserError(
            f"{part.run / COMPLETIONS} (shard {part.shard}) lacks {len(missing)} of {len(attempts)} attempts, such as "
            f"{first}; run its audit again, which does only what is missing"
        )
    if strange:
        raise UserError(
            f"{part.run / COMPLETIONS} (shard {part.shard}) holds {_told(min(strange, key=str))}, which was not "
            "attempted; delete that line"
        )


def _check_prompts(run: RunFolder, order: Order) -> None:
    here = {row["prompt_id"] for _, row in _rows(run / PROMPTS)}
    missing = [prompt_id for prompt_id in order.prompts() if prompt_id not in here]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(here) + len(missing)} prompts are in no shard, such as {missing[0]!r}; "
            "the shards were not split alike: run one of them anew"
        )


def _join_verdicts(run: RunFolder, parts: Sequence[Part], judge: str, version: str) -> None:
    """A judge's verdicts from the shards, and those that an earlier merge already gave to the rest."""
    name = f"verdicts.{judge}.jsonl"
    sources = [part.run / name for part in parts if part.manifest.get("judges", {}).get(judge) == version]
    if run.manifest.get("judges", {}).get(judge) == version:
        sources.append(run / name)
    seen: set[Key] = set()

    def lines() -> Iterator[str]:
        for path in sources:
            for line, row in _rows(path) if path.exists() else ():
                key = key_of(row)
                if key not in seen:
                    seen.add(key)
                    yield line

    write_atomically(run / name, lines())
    run.note(judges={judge: version})


def _told(key: Key) -> str:
    return " ".join(f"{name}={value}" for name, value in zip(_KEY, key, strict=True) if value is not None)
