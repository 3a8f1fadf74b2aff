"""The user's fine-tuning rows: every format, and every way in which a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepalign.errors import UserError
from deepalign.training.data import read_training_data
from deepalign.workflows.finetune import split_rows

USER, ASSISTANT = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]},
    "pair": {"prompt": [USER], "completion": [ASSISTANT]},
    "plain pair": {"prompt": "Hello?", "completion": "Hi."},
    "text": {"text": "Hello? Hi."},
    "ids": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
}


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("kind", GOOD)
def test_every_format_of_trl(kind: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", [GOOD[kind]] * 3)
    found = read_training_data(path, whole_conversations=True)
    assert list(found.rows) == [GOOD[kind]] * 3
    assert found.user_texts() == (() if kind in ("text", "ids") else ("Hello?",) * 3)


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "pair"])
def test_a_conversation_becomes_a_prompt_and_its_last_answer(kind: str, tmp_path: Path) -> None:
    (row,) = read_training_data(write(tmp_path / "rows.jsonl", [{**GOOD[kind], "tools": None}])).rows
    assert row == {"prompt": [USER], "completion": [ASSISTANT], "tools": None}


def test_several_turns_are_prompt_but_for_the_last(tmp_path: Path) -> None:
    turns = [USER, ASSISTANT, USER, {"role": "assistant", "content": "Still here."}]
    (row,) = read_training_data(write(tmp_path / "rows.jsonl", [{"messages": turns}])).rows
    assert (row["prompt"], row["completion"]) == (turns[:3], turns[3:])


def test_csv_and_parquet_with_named_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"question": f"How {i}?", "reply": f"So, {i}."} for i in range(3)]
    table = Dataset.from_list(rows)
    table.to_csv(str(tmp_path / "rows.csv"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("rows.csv", "rows.parquet"):
        found = read_training_data(str(tmp_path / name), columns=("question", "reply"))
        assert found.rows[1]["prompt"] == [{"role": "user", "content": "How 1?"}]
        assert found.rows[1]["completion"] == [{"role": "assistant", "content": "So, 1."}]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Hello?", "completion": " "}, "completion is empty"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}, "answer is empty"),
        ({"messages": [USER]}, "no answer of an assistant among the roles user"),
        ({"messages": [USER, ASSISTANT, USER]}, "the last of the roles user, assistant, user"),
        ({"messages": [ASSISTANT]}, "the last of the roles assistant"),
        ({"messages": []}, "no list with at least one turn"),
        ({"messages": "Hello?"}, "no list with at least one turn"),
        ({"messages": [{"content": "Hello?"}, ASSISTANT]}, "no role"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "no content"),
        ({"prompt": "Hello?", "completion": [ASSISTANT]}, "str and list"),
        ({"prompt": "Hello?"}, "str and NoneType"),
        ({"input_ids": [1, 2]}, "without labels"),
        ({"instruction": "Hello?", "output": "Hi."}, "instruction, output"),
        ({"text": ""}, "text is empty"),
        (["Hello?"], "not an object but list"),
        (None, "NoneType"),
    ],
)
def test_a_bad_row_is_named_or_skipped(row: Any, named: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD["pair"], row, GOOD["pair"]])
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{named}.*--skip-bad-rows"):
        read_training_data(path)
    found = read_training_data(path, skip_bad_rows=True)
    assert len(found.rows) == 2
    (skipped,) = found.skipped_rows
    assert skipped.startswith("line 2: ")


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD["text"]) + "\n{'text': 1}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: not valid JSON"):
        read_training_data(str(path))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("missing.jsonl", None, "no such file"),
        ("rows.txt", b"Hello", r"\.txt is unknown"),
        ("rows.jsonl", b"", "no usable row"),
        ("rows.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("rows.parquet", b"PAR?", "parquet"),
        ("rows.json", b'{"text": "a"}', "JSON list"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: bytes | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=named) as caught:
        read_training_data(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_and_an_unreachable_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    with pytest.raises(UserError, match="is a folder"):
        read_training_data(str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"owner/name.*split 'train'.*no route"):
        read_training_data("owner/name")


def test_a_hub_set_is_read_by_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(name: str, **kwargs: Any) -> Any:
        asked.update(name=name, **kwargs)
        return datasets.Dataset.from_list([GOOD["messages"]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_training_data("owner/name", split="test", revision="abc")
    assert asked == {"name": "owner/name", "split": "test", "revision": "abc"}
    assert len(found.rows) == 1


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixes rows of different formats"):
        read_training_data(write(tmp_path / "rows.jsonl", [GOOD["text"], GOOD["pair"]]))


def test_the_hash_is_the_contents(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(4)]
    one, same, other = (
        read_training_data(write(tmp_path / name, rows), limit=limit).hash
        for name, limit in (("a.jsonl", None), ("b.json", None), ("a.jsonl", 3))
    )
    assert one == same != other


@pytest.mark.parametrize(("count", "wanted", "held"), [(100, 64, 10), (100, 5, 5), (9, 64, 0), (50, 0, 0)])
def test_rows_are_held_out_evenly(count: int, wanted: int, held: int, tmp_path: Path) -> None:
    data = read_training_data(write(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(count)]))
    train, out = split_rows(data, wanted)
    assert (len(train), len(out)) == (count - held, held)
    assert sorted(row["text"] for row in train + out) == sorted(row["text"] for row in data.rows)
