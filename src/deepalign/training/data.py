"""The user's fine-tuning rows: from a file or the hub, in any of TRL's formats, checked before anything is trained.

Owns what a row must look like. Tokenising is the trainer's.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.errors import UserError, first_line

_FORMATS = "messages, prompt + completion, text, conversations, or input_ids + labels"
_CHAT_LISTS = ("messages", "conversations", "prompt", "completion")
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Rows that can be trained on."""

    name: str
    rows: tuple[dict[str, Any], ...]
    skipped_rows: tuple[str, ...]
    """Each bad row with its reason."""

    @property
    def hash(self) -> str:
        """16 hex digits over all rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()[:16]

    def user_texts(self) -> tuple[str, ...]:
        """What users say in the rows, for telling whether a test prompt is trained on."""
        return tuple(text for row in self.rows for text in _user_texts(row))


def read_training_data(
    name: str,
    *,
    split: str = "train",
    revision: str | None = None,
    columns: tuple[str, str] | None = None,
    whole_conversations: bool = False,
    skip_bad_rows: bool = False,
    limit: int | None = None,
) -> TrainingData:
    """Rows of a file or a hub set.

    Args:
        name: A .jsonl, .json, .csv, .tsv or .parquet file, or a hub id.
        split: Of a hub set.
        revision: Of a hub set.
        columns: Columns with the user's and the assistant's text, which become a conversation.
        whole_conversations: Keep rows of messages as they are, instead of as a prompt and its last answer.
        skip_bad_rows: Leave bad rows out, and name them, instead of refusing the set.
        limit: Only the first so many.

    Raises:
        UserError: No such file or set, a bad row, or no row at all.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for place, row in _read(name, split, revision):
        if limit is not None and len(rows) >= limit:
            break
        try:
            good = _checked(row if columns is None else _chat(row, columns))
            rows.append(good if whole_conversations else as_pair(good))
        except ValueError as error:
            if not skip_bad_rows:
                raise UserError(f"{name}, {place}: {error}; or go on without such rows with --skip-bad-rows") from None
            skipped.append(f"{place}: {error}")
    if not rows:
        raise UserError(f"{name} holds no usable row" + (f" ({len(skipped)} bad ones)" if skipped else ""))
    kinds = {_kind(row) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"{name} mixes rows of different formats ({' and '.join(sorted(kinds))}); use one")
    return TrainingData(name=name, rows=tuple(rows), skipped_rows=tuple(skipped))


def table_of(rows: Sequence[Row], name: str) -> Any:
    """The rows as a `datasets.Dataset`.

    Raises:
        UserError: A column holds values of different kinds.
    """
    from datasets import Dataset

    try:
        return Dataset.from_list(list(rows))
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: a column holds values of different kinds ({first_line(error)})") from error


def as_pair(row: Row) -> dict[str, Any]:
    """A conversation as the prompt and the completion that its last answer is; other rows as they are.

    A conversation that is learned whole has its prompt's tokens in the loss, and no response position to count from.

    Raises:
        ValueError: The last turn is not the assistant's, or nothing stands before it.
    """
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        return dict(row)
    turns = [_turn(turn) for turn in row[name]]
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(
            f"the last of the roles {', '.join(turn['role'] for turn in turns)} is not an assistant's answer"
        )
    rest = {column: value for column, value in row.items() if column != name}
    return {**rest, "prompt": turns[:-1], "completion": turns[-1:]}


def _turn(turn: Row) -> dict[str, Any]:
    """A turn with role and content, from either way of writing them."""
    if "role" in turn:
        return dict(turn)
    names = {"human": "user", "gpt": "assistant"}
    return {"role": names.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _read(name: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Rows with their place, as the file or set has them."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"--data {name} is a folder; give a .jsonl, .json, .csv or .parquet file, or a hub id")
    if path.is_file():
        try:
            yield from _read_file(path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"--data {name} cannot be read: {first_line(error)}") from error
        return
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet") or name.startswith((".", "/", "~")):
        raise UserError(f"--data {name}: no such file")
    yield from _read_hub(name, split, revision)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", _parsed(line, path, number)
    elif suffix == ".json":
        found = _parsed(path.read_text(encoding="utf-8-sig"), path, 1)
        if not isinstance(found, list):
            raise UserError(f"{path} does not hold a JSON list; write one object for each row, or use .jsonl")
        yield from ((f"row {number}", row) for number, row in enumerate(found, start=1))
    elif suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
            yield from ((f"row {number}", row) for number, row in enumerate(reader, start=1))
    elif suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise UserError(
            f"--data {path}: {suffix or 'no suffix'} is unknown; give .jsonl, .json, .csv, .tsv or .parquet"
        )


def _parsed(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({first_line(error)})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(path))
    except Exception as error:
        # pyarrow and the hub's client raise what they like on a broken file.
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(name: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        # The hub client raises many kinds (HTTP, gating, missing split, offline); all mean it cannot be had.
        raise UserError(
            f"--data {name}: no such file, and the hub did not give split {split!r} of it ({first_line(error)}); check "
            "the spelling, your network, or log in with `hf auth login` if it is gated"
        ) from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _chat(row: Any, columns: tuple[str, str]) -> dict[str, Any]:
    """A conversation from two columns of text."""
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    for column in columns:
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(f"column {column!r} holds no text (there are {', '.join(map(str, row))})")
    return {
        "prompt": [{"role": "user", "content": row[columns[0]]}],
        "completion": [{"role": "assistant", "content": row[columns[1]]}],
    }


def _kind(row: Row) -> str:
    if "input_ids" in row:
        return "input_ids + labels"
    if "messages" in row or "conversations" in row:
        return "messages"
    if "prompt" in row:
        return "prompt + completion" if isinstance(row["prompt"], str) else "prompt + completion as messages"
    return "text"


def _checked(row: Any) -> dict[str, Any]:
    """The row, if it can be trained on; raises `ValueError` with what is wrong."""
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    columns = ", ".join(map(str, row))
    if "input_ids" in row:
        if "labels" not in row:
            raise ValueError(f"input_ids without labels (columns {columns})")
    elif "messages" in row or "conversations" in row:
        _check_turns(row["messages"] if "messages" in row else row["conversations"], answered=True)
    elif "prompt" in row or "completion" in row:
        _check_pair(row.get("prompt"), row.get("completion"))
    elif "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError("text is empty")
    else:
        raise ValueError(f"no column that can be trained on (there are {columns}); give {_FORMATS}, or name yours with "
                         "--prompt-column and --completion-column")  # fmt: skip
    return dict(row)


def _check_pair(prompt: Any, completion: Any) -> None:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ValueError("completion is empty: there is nothing to learn")
    elif isinstance(prompt, list) and isinstance(completion, list):
        _check_turns(prompt, answered=False)
        _check_turns(completion, answered=True)
    else:
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise ValueError(f"prompt and completion are {kinds}; give two texts, or two lists of messages")


def _check_turns(turns: Any, *, answered: bool) -> None:
    if not isinstance(turns, list) or not turns:
        raise ValueError("messages are no list with at least one turn")
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str):
            raise ValueError("a message has no role; give objects with role and content")
        content = turn.get("content", turn.get("value"))
        if content is None and not turn.get("tool_calls"):
            raise ValueError(f"the message of {role} has no content")
        if answered and role in ("assistant", "gpt") and isinstance(content, str) and not content.strip():
            raise ValueError("the assistant's answer is empty: there is nothing to learn")
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    if answered and not {"assistant", "gpt"} & set(roles):
        raise ValueError(f"no answer of an assistant among the roles {', '.join(roles)}")


def _user_texts(row: Row) -> Iterator[str]:
    turns = row.get("messages") or row.get("conversations") or row.get("prompt") or []
    if isinstance(turns, str):
        yield turns
        return
    for turn in turns:
        if turn.get("role", turn.get("from")) in ("user", "human"):
            content = turn.get("content", turn.get("value"))
            if isinstance(content, str):
                yield content
