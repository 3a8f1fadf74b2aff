"""A task's data from the user's files: splits, kinds, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from deepalign.errors import UserError
from deepalign.utility.rows import local_hash, local_splits

ROWS = [{"q": "one?", "a": ["x", "y"]}, {"q": "two?", "a": ["z", "w"]}]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", ROWS)
    for name in ("a.json", "a.parquet", "a.jsonl"):
        assert local_splits(tmp_path / name, None, "test", None)["test"].to_list() == ROWS
    (tmp_path / "a.csv").write_text("q,a\none?,x\n", encoding="utf-8")
    assert local_splits(tmp_path / "a.csv", None, "test", None)["test"].to_list() == [{"q": "one?", "a": "x"}]


def test_splits_are_found_as_the_hub_lays_them_out(tmp_path: Path) -> None:
    lines(tmp_path / "anatomy" / "test-00000-of-00002.jsonl", ROWS[:1])
    lines(tmp_path / "anatomy" / "test-00001-of-00002.jsonl", ROWS[1:])
    lines(tmp_path / "anatomy" / "validation-0.jsonl", ROWS[:1])
    lines(tmp_path / "other" / "test.jsonl", ROWS[:1])
    found = local_splits(tmp_path, "anatomy", "test", "dev")
    assert found["test"].to_list() == ROWS
    assert found["dev"].to_list() == ROWS[:1], "dev is the hub's validation"
    lines(tmp_path / "law.jsonl", ROWS[1:])
    assert local_splits(tmp_path, "law", "test", None)["test"].to_list() == ROWS[1:]


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", ROWS)
    before = local_hash(file)
    assert before == local_hash(tmp_path)
    lines(file, ROWS[:1])
    assert local_hash(file) != before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"q": "x"}\n{"q":', "line 2: not JSON"),
        ("a.jsonl", '{"q": "x"}\n{"p": "y"}\n', "row 2: 'q' is missing"),
        ("a.jsonl", '{"q": "x"}\n[1]\n', "row 2: not an object with columns but list"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '{"q": "x"}', "no list of rows"),
        ("a.txt", "x", "of no known kind"),
        ("a.parquet", "x", "cannot be read"),
        ("a.jsonl", '{"q": "x"}\n{"q": [1]}\n', "rows differ in kinds of values"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_remedy(tmp_path: Path, name: str, content: str, told: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=told) as caught:
        local_splits(file, None, "test", None)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_split_says_which_file_it_wants(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS)
    lines(tmp_path / "extra.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no file .*test\*"):
        local_splits(tmp_path, None, "test", None)
    with pytest.raises(UserError, match="does not exist"):
        local_splits(tmp_path / "none", None, "test", None)
