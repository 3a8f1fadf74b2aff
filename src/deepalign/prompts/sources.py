"""Prompt sets by name or from the user's file: CSV, TSV, JSON Lines, JSON list or plain lines.

Owns column mapping and what counts as a bad row. A bad row among good ones is named with its line; nothing is dropped
unless the user asked for that, and then it is counted.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.errors import UserError
from deepalign.prompts import BUILTIN_SETS, builtin_prompts
from deepalign.records import Prompt, to_jsonl

MAX_PROMPT_CHARS = 100_000
_SHOWN_CHARS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which column or key holds what."""

    text: str = "text"
    answer: str = "answer"
    category: str = "category"
    prompt_id: str = "prompt_id"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts with the name they were asked for by, and the rows that were left out."""

    name: str
    prompts: tuple[Prompt, ...]
    skipped_rows: tuple[str, ...] = ()
    """One line for each bad row that the user let go."""

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the prompts as JSON Lines."""
        return hashlib.sha256(to_jsonl(self.prompts).encode()).hexdigest()[:16]


class _BadRowError(Exception):
    """One row cannot be used; the text says why."""


def load_prompts(
    name: str, columns: Columns | None = None, *, skip_bad_rows: bool = False, limit: int | None = None
) -> PromptSet:
    """A built-in set or a file of prompts.

    Raises:
        UserError: No such set or file, an unreadable or empty file, a missing column, a bad or doubled row.
    """
    name = name.removeprefix("builtin:")
    if name in BUILTIN_SETS:
        return PromptSet(name=name, prompts=spread(builtin_prompts(name), limit))
    path = _file(name)
    prompts: list[Prompt] = []
    skipped: list[str] = []
    seen: dict[str, int] = {}
    for line, row in _rows(path, columns or Columns()):
        try:
            prompt = _prompt(row, line, columns or Columns())
            if prompt.prompt_id in seen:
                raise _BadRowError(f"id {prompt.prompt_id!r} already stands in line {seen[prompt.prompt_id]}")
        except _BadRowError as problem:
            if not skip_bad_rows:
                raise UserError(f"{path}, line {line}: {problem}; mend it, or go on with --skip-bad-rows") from None
            skipped.append(f"line {line}: {problem}")
            continue
        seen[prompt.prompt_id] = line
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no usable prompt" + (f" ({len(skipped)} bad rows)" if skipped else ""))
    return PromptSet(name=str(path), prompts=spread(prompts, limit), skipped_rows=tuple(skipped))


def spread(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """At most `limit` prompts, taken from the categories in turn; the order of the set is kept."""
    if limit is None or limit >= len(prompts):
        return tuple(prompts)
    by_category: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(index)
    turns = max(len(members) for members in by_category.values())
    in_turn = [members[turn] for turn in range(turns) for members in by_category.values() if turn < len(members)]
    return tuple(prompts[index] for index in sorted(in_turn[:limit]))


def _file(name: str) -> Path:
    what = "is neither a file nor a built-in set"
    # Text that is no path at all, such as a whole prompt, makes the system or the home look-up raise.
    with contextlib.suppress(OSError, RuntimeError):
        path = Path(name).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            what = "is a folder"
    raise UserError(f"--prompts {name[:_SHOWN_CHARS]} {what}; built-in sets: {', '.join(BUILTIN_SETS)}")


def _rows(path: Path, columns: Columns) -> Iterator[tuple[int, Any]]:
    """Rows with the line each begins on; a row that cannot be parsed comes as a `_BadRowError` instance."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from _csv_rows(path, text, "\t" if kind == ".tsv" else ",", columns)
    elif kind in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(text)
    elif kind == ".json":
        yield from _json_rows(path, text)
    elif kind in (".txt", ""):
        lines = enumerate(text.splitlines(), start=1)
        yield from ((number, {columns.text: line}) for number, line in lines if line.strip())
    else:
        raise UserError(f"{path}: files of kind {kind} are not read; give .csv, .tsv, .jsonl, .json or .txt")


def _csv_rows(path: Path, text: str, delimiter: str, columns: Columns) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not a CSV header ({error})") from error
    if columns.text not in header:
        raise UserError(
            f"{path} has no column {columns.text!r}; it has {', '.join(map(repr, header)) or 'none'}: "
            "name the right one with --text-column"
        )
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, _BadRowError(f"not valid CSV ({error})")
            continue
        if len(cells) > len(header):
            yield first, _BadRowError("more fields than the header has columns")
        elif cells:
            yield first, dict(itertools.zip_longest(header, cells))


def _jsonl_rows(text: str) -> Iterator[tuple[int, Any]]:
    # Only "\n" ends a JSON line: `splitlines` would also cut at separators that may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _BadRowError(f"not valid JSON ({error})")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a JSON list of rows")
    yield from enumerate(rows, start=1)


def _prompt(row: Any, line: int, columns: Columns) -> Prompt:
    if isinstance(row, _BadRowError):
        raise row
    if isinstance(row, str):
        row = {columns.text: row}
    if not isinstance(row, Mapping):
        raise _BadRowError(f"not an object with a {columns.text!r} field")
    if columns.text not in row:
        has = ", ".join(repr(key) for key in row) or "none"
        raise _BadRowError(f"no {columns.text!r} field (it has {has}); name the right one with --text-column")
    text = _text(row, columns.text)
    if not text:
        raise _BadRowError(f"{columns.text!r} is empty")
    return Prompt(
        prompt_id=_text(row, columns.prompt_id) or f"line-{line}",
        text=text,
        category=_text(row, columns.category) or "uncategorised",
        answer=_text(row, columns.answer, strip=False) or None,
    )


def _text(row: Mapping[str, Any], column: str, *, strip: bool = True) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _BadRowError(f"{column!r} is {type(value).__name__}, not text")
    if len(value) > MAX_PROMPT_CHARS:
        raise _BadRowError(f"{column!r} has {len(value)} characters, more than {MAX_PROMPT_CHARS}")
    if "\x00" in value:
        raise _BadRowError(f"{column!r} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError(f"{column!r} holds half of a surrogate pair") from None
    return value.strip() if strip else (value if value.strip() else "")


def with_answers(prompts: Iterable[Prompt], answers: Mapping[str, str]) -> tuple[Prompt, ...]:
    """The prompts with sampled answers filled in where they had none."""
    return tuple(
        Prompt(
            prompt_id=prompt.prompt_id,
            text=prompt.text,
            category=prompt.category,
            behaviour=prompt.behaviour,
            style=prompt.style,
            answer=prompt.answer or answers.get(prompt.prompt_id),
        )
        for prompt in prompts
    )
