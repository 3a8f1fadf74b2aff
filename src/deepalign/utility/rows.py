"""A task's data from the user's files: splits found by name, rows read as they stand, mistakes told by file and row.

Reads JSON, JSON Lines, CSV and Parquet without any cache. Columns are the task's own; what they mean is its business.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from deepalign.errors import UserError, first_line

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_SPELLINGS = {"validation": ("validation", "valid", "val", "dev"), "dev": ("dev", "validation", "val")}


def local_splits(path: Path, subset: str | None, tested: str, fewshot: str | None) -> dict[str, Dataset]:
    """The splits of a task that a file or folder holds.

    A file, or the only file of a folder, is the split that is tested. A folder has one file or more for each split,
    that begin with its name (`test-00000.parquet`), at its top or in a subfolder that is called like the subset.

    Raises:
        UserError: There is no such path or split, or a row cannot be read.
    """
    if path.is_file():
        return {tested: _dataset([path])}
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the task a file or folder of {', '.join(_KINDS)}")
    folder = path / subset if subset and (path / subset).is_dir() else path
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _KINDS]
    own = [file for file in files if subset and file.stem == subset]
    if len(own or files) == 1:
        return {tested: _dataset(own or files)}
    found = {split: _of_split(files, split) for split in dict.fromkeys(filter(None, (tested, fewshot)))}
    if not found[tested]:
        names = f"{folder / tested}* of {', '.join(_KINDS)}"
        raise UserError(f"{path} has no file {names}; name the files by their split, or give one file")
    return {split: _dataset(named) for split, named in found.items() if named}


def local_hash(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of all data files under a path, with their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in _KINDS)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    for spelling in _SPELLINGS.get(split, (split,)):
        named = [file for file in files if file.stem.lower().startswith(spelling)]
        if named:
            return named
    return []


def _dataset(files: Sequence[Path]) -> Dataset:
    rows = [row for file in files for row in _rows(file)]
    if not rows:
        raise UserError(f"{files[0]} holds no rows; give at least one")
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{files[0]}: rows differ in kinds of values ({first_line(error)}); mend it") from error


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        rows = _READERS[file.suffix.lower()](file)
    except KeyError:
        raise UserError(f"{file} is of no known kind; give one of {', '.join(_KINDS)}") from None
    except UserError:
        raise
    except Exception as error:
        # pyarrow, json and the decoders each have errors of their own.
        raise UserError(f"{file} cannot be read: {first_line(error)}; mend it, or give another file") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: not an object with columns but {type(row).__name__}; mend it")
        missing = [name for name in rows[0] if row.get(name) is None and rows[0][name] is not None]
        if missing:
            raise UserError(f"{file}, row {number}: {missing[0]!r} is missing; mend it, or leave the row out")
    return rows


def _json_lines(file: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not JSON ({first_line(error)}); mend it") from None
    return rows


def _json(file: Path) -> list[Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    for key in ("data", "examples", "rows"):
        if isinstance(data, dict) and isinstance(data.get(key), list):
            data = data[key]
    if not isinstance(data, list):
        raise UserError(f"{file} is no list of rows; give a list of objects, or JSON Lines")
    return data


def _csv(file: Path) -> list[Any]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ","))


def _parquet(file: Path) -> list[Any]:
    parquet = importlib.import_module("pyarrow.parquet")

    rows: list[Any] = parquet.read_table(file).to_pylist()
    return rows


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
