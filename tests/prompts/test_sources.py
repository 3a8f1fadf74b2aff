"""Prompt files of every kind, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepalign.errors import UserError
from deepalign.prompts import BUILTIN_SETS, builtin_prompts
from deepalign.prompts.sources import MAX_PROMPT_CHARS, Columns, load_prompts, spread, with_answers
from deepalign.records import Prompt

TWO = [
    Prompt(prompt_id="a", text="First?", category="x", answer="Yes."),
    Prompt(prompt_id="b", text="Sécond?", category="uncategorised"),
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes, name: str = "prompts.csv") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refused(name: str, columns: Columns | None = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_prompts(name, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "prompt_id,text,category,answer\na,First?,x,Yes.\nb,Sécond?,,\n"),
        ("P.CSV", "prompt_id,text,category,answer\na,First?,x,Yes.\nb,Sécond?,,\n"),
        ("crlf.csv", "prompt_id,text,category,answer\r\na,First?,x,Yes.\r\nb,Sécond?,,\r\n"),
        ("short_row.csv", "prompt_id,text,category,answer\na,First?,x,Yes.\nb,Sécond?\n"),
        ("no_newline_at_end.csv", "prompt_id,text,category,answer\na,First?,x,Yes.\nb,Sécond?,,"),
        ("bom.csv", "\ufeffprompt_id,text,category,answer\na,First?,x,Yes.\nb,Sécond?,,\n"),
        ("spaces.csv", " prompt_id , text ,category,answer\na, First? ,x,Yes.\n b ,Sécond?,,\n"),
        ("index_column.csv", ",prompt_id,text,category,answer\n0,a,First?,x,Yes.\n1,b,Sécond?,,\n"),
        ("blank_lines.csv", "prompt_id,text,category,answer\n\na,First?,x,Yes.\n\n\nb,Sécond?,,\n\n"),
        ("p.tsv", "prompt_id\ttext\tcategory\tanswer\na\tFirst?\tx\tYes.\nb\tSécond?\t\t\n"),
        (
            "p.jsonl",
            '{"prompt_id":"a","text":"First?","category":"x","answer":"Yes."}\n\n{"text":"Sécond?","prompt_id":"b"}',
        ),
        (
            "bom.ndjson",
            '\ufeff{"prompt_id":"a","text":"First?","category":"x","answer":"Yes."}\r\n'
            '{"text":"S\\u00e9cond?","prompt_id":"b","category":null,"answer":"  "}\r\n',
        ),
        (
            "p.json",
            '[{"prompt_id":"a","text":"First?","category":"x","answer":"Yes."},{"text":"Sécond?","prompt_id":"b"}]',
        ),
    ],
)
def test_every_kind_of_file_gives_the_same_prompts(write: Any, name: str, content: str) -> None:
    loaded = load_prompts(write(content, name))
    assert list(loaded.prompts) == TWO
    assert loaded.skipped_rows == ()
    assert loaded.name.endswith(name)


@pytest.mark.parametrize("name", ["p.txt", "prompts"])
def test_plain_lines_are_prompts_named_by_their_line(write: Any, name: str) -> None:
    loaded = load_prompts(write('\ufeffOne?\n\n  Two, "three"?  \r\n', name))
    assert [(prompt.prompt_id, prompt.text) for prompt in loaded.prompts] == [
        ("line-1", "One?"),
        ("line-3", 'Two, "three"?'),
    ]


def test_a_json_list_of_strings(write: Any) -> None:
    assert [prompt.text for prompt in load_prompts(write('["One?", "Two?"]', "p.json")).prompts] == ["One?", "Two?"]


def test_a_quoted_newline_stays_in_its_cell_and_the_next_row_keeps_its_line(write: Any) -> None:
    path = write('text,answer\n"One,\nand ""two""?","a\nb"\nThree?,\n')
    one, three = load_prompts(path).prompts
    assert (one.text, one.answer, one.prompt_id) == ('One,\nand "two"?', "a\nb", "line-2")
    assert three.prompt_id == "line-5"


def test_a_line_separator_inside_json_text_is_text(write: Any) -> None:
    path = write('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n', "p.jsonl")
    assert [prompt.text for prompt in load_prompts(path).prompts] == ["one\u2028two\x85three", "four"]


def test_an_answer_keeps_its_white_space(write: Any) -> None:
    (prompt,) = load_prompts(write('text,answer\n" q ","\n 1. a\n"\n')).prompts
    assert (prompt.text, prompt.answer) == ("q", "\n 1. a\n")


def test_columns_are_mapped(write: Any) -> None:
    columns = Columns(text="goal", answer="target", category="kind", prompt_id="nr")
    path = write("nr,goal,target,kind,text\n7,Do it,Sure,k,not this\n")
    assert load_prompts(path, columns).prompts == (Prompt(prompt_id="7", text="Do it", category="k", answer="Sure"),)
    path = write('{"nr": 7, "goal": "Do it", "target": "Sure", "kind": "k"}', "p.jsonl")
    assert load_prompts(path, columns).prompts == (Prompt(prompt_id="7", text="Do it", category="k", answer="Sure"),)


def test_plain_lines_ignore_the_mapping(write: Any) -> None:
    assert load_prompts(write("One?\n", "p.txt"), Columns(text="goal")).prompts[0].text == "One?"


def test_numbers_are_text(write: Any) -> None:
    loaded = load_prompts(write('{"text": 42, "prompt_id": 7, "category": 0}\n', "p.jsonl"))
    assert loaded.prompts == (Prompt(prompt_id="7", text="42", category="0"),)
    assert load_prompts(write("text\n42\n")).prompts[0].text == "42"


@pytest.mark.parametrize("content", ["goal,answer\nx,y\n", "goal;text\nx;y\n"])
def test_a_missing_column_names_those_that_there_are(write: Any, content: str) -> None:
    line = refused(write(content))
    assert "no column 'text'" in line
    assert "goal" in line
    assert "--text-column" in line


def test_a_missing_key_names_those_that_there_are(write: Any) -> None:
    line = refused(write('{"text": "a"}\n{"goal": "b", "kind": 1}\n', "p.jsonl"))
    assert "line 2" in line
    assert "'goal', 'kind'" in line
    assert "--text-column" in line


LONG = "x" * (MAX_PROMPT_CHARS + 1)
BEYOND_CSV = "y" * 200_000
BAD_ROWS = [
    ("p.csv", "text,answer\ngood one,a\n,b\ngood two,c\n", 3, "'text' is empty"),
    ("p.csv", "text,answer\ngood one,a\n\n\n,b\ngood two,c\n", 5, "'text' is empty"),
    ("p.csv", 'text,answer\n"good\none",a\n  ,b\ngood two,c\n', 4, "'text' is empty"),
    ("p.csv", "text,answer\ngood one,a\nbad,b,c\ngood two,c\n", 3, "more fields"),
    ("p.csv", 'text,answer\ngood one,a\n"bad"x,b\ngood two,c\n', 3, "not valid CSV"),
    ("p.csv", "text,answer\ngood one,a\nb\x00ad,b\ngood two,c\n", 3, "NUL"),
    ("p.csv", f"text,answer\ngood one,a\n{LONG},b\ngood two,c\n", 3, str(MAX_PROMPT_CHARS)),
    ("p.csv", f"text,answer\ngood one,a\n{BEYOND_CSV},b\ngood two,c\n", 3, "limit"),
    ("p.csv", "text,prompt_id\ngood one,a\nbad,a\ngood two,c\n", 3, "'a' already stands in line 2"),
    ("p.jsonl", '{"text":"good one"}\n{"text": \n{"text":"good two"}\n', 2, "not valid JSON"),
    ("p.jsonl", '{"text":"good one"}\n[1]\n{"text":"good two"}\n', 2, "not an object"),
    ("p.jsonl", '{"text":"good one"}\n{"text":null}\n{"text":"good two"}\n', 2, "empty"),
    ("p.jsonl", '{"text":"good one"}\n{"text":["a"]}\n{"text":"good two"}\n', 2, "list, not text"),
    ("p.jsonl", '{"text":"good one"}\n{"text":true}\n{"text":"good two"}\n', 2, "bool, not text"),
    ("p.jsonl", '{"text":"good one"}\n{"text":"a","answer":{}}\n{"text":"good two"}\n', 2, "'answer' is dict"),
    ("p.jsonl", '{"text":"good one"}\n{"text":"a\\u0000"}\n{"text":"good two"}\n', 2, "NUL"),
    ("p.jsonl", '{"text":"good one"}\n{"text":"a\\ud800"}\n{"text":"good two"}\n', 2, "surrogate"),
    ("p.jsonl", '{"text":"good one"}\n{"text":"a","prompt_id":"\\udfff"}\n{"text":"good two"}\n', 2, "surrogate"),
    ("p.jsonl", '{"text":"good one"}\n{"text":"a","prompt_id":"line-1"}\n{"text":"good two"}\n', 2, "already stands"),
    ("p.jsonl", '{"text":"good one"}\n' + "[" * 100_000 + '\n{"text":"good two"}\n', 2, "not valid JSON"),
    ("p.json", '[{"text":"good one"}, 7, {"text":"good two"}]', 2, "not an object"),
]


@pytest.mark.parametrize(("name", "content", "line", "why"), BAD_ROWS, ids=[f"{r[0]}: {r[3]}" for r in BAD_ROWS])
def test_a_bad_row_is_named_with_its_line_and_can_be_let_go(
    write: Any, name: str, content: str, line: int, why: str
) -> None:
    path = write(content, name)
    told = refused(path)
    assert told.startswith(f"{path}, line {line}: ")
    assert why in told
    assert "--skip-bad-rows" in told
    assert len(told) < 500
    loaded = load_prompts(path, skip_bad_rows=True)
    assert [prompt.text.replace("\n", " ") for prompt in loaded.prompts] == ["good one", "good two"]
    (skipped,) = loaded.skipped_rows
    assert skipped.startswith(f"line {line}: ")


def test_an_unclosed_quote_does_not_swallow_rows_silently(write: Any) -> None:
    path = write('text,answer\ngood,a\n"bad,b\nlost,c\n')
    assert "line 3" in refused(path)
    loaded = load_prompts(path, skip_bad_rows=True)
    assert [prompt.text for prompt in loaded.prompts] == ["good"]
    assert len(loaded.skipped_rows) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", ""),
        ("p.csv", "text,answer\n"),
        ("p.csv", "\n\n"),
        ("p.jsonl", "\n"),
        ("p.json", "[]"),
        ("p.txt", " \n\n"),
        ("p.jsonl", ""),
    ],
)
def test_an_empty_file_is_refused_by_name(write: Any, name: str, content: str) -> None:
    path = write(content, name)
    assert path in refused(path)


def test_nothing_but_bad_rows_is_refused_and_counted(write: Any) -> None:
    path = write("text,answer\n,a\n,b\n")
    with pytest.raises(UserError, match=r"no usable prompt \(2 bad rows\)"):
        load_prompts(path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("p.xlsx", "text\na\n", r"\.xlsx"),
        ("p.parquet", "text\na\n", r"\.csv"),
        ("p.json", '{"text": "a"}', "JSON list"),
        ("p.json", "[1,", "not valid JSON"),
        ("p.json", "[" * 100_000, "not valid JSON"),
        ("p.csv", b"text\nok\n\xff\xfe\n", "line 3: not UTF-8"),
        ("p.csv", "text\na\n".encode("utf-16"), "line 1: not UTF-8"),
        ("p.jsonl", b'{"text": "\xe9"}\n', "line 1: not UTF-8"),
        ("p.csv", 'a"b"c,"text\n', "header|column"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(write: Any, name: str, content: str | bytes, why: str) -> None:
    path = write(content, name)
    with pytest.raises(UserError, match=why) as caught:
        load_prompts(path, skip_bad_rows=True)
    assert path in str(caught.value)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder" in refused(str(tmp_path))
    told = refused(str(tmp_path / "nowhere.csv"))
    assert "nowhere.csv" in told
    assert all(name in told for name in BUILTIN_SETS)


@pytest.mark.parametrize("name", ["How do I pick a lock? " * 30, "a\x00b", "~nobody-of-this-name/x.csv", ""])
def test_text_that_is_no_name_at_all(name: str) -> None:
    assert "built-in" in refused(name)


def test_builtin_names() -> None:
    plain, prefixed = load_prompts("benign"), load_prompts("builtin:benign")
    assert plain == prefixed
    assert plain.prompts == builtin_prompts("benign")
    with pytest.raises(UserError, match="should-refuse"):
        builtin_prompts("nope")


def test_the_hash_follows_the_content_only(write: Any) -> None:
    one = load_prompts(write("text,answer\na,b\n", "one.csv"))
    same = load_prompts(write('{"text":"a","answer":"b","prompt_id":"line-2"}', "two.jsonl"))
    other = load_prompts(write("text,answer\na,c\n", "three.csv"))
    assert one.hash == same.hash != other.hash
    assert len(one.hash) == 16


def prompts_of(categories: str) -> list[Prompt]:
    return [Prompt(prompt_id=str(i), text="t", category=category) for i, category in enumerate(categories)]


@pytest.mark.parametrize(
    ("categories", "limit", "kept"),
    [
        ("aaabbc", 3, [0, 3, 5]),
        ("aaabbc", 4, [0, 1, 3, 5]),
        ("aaabbc", 1, [0]),
        ("aaabbc", 6, [0, 1, 2, 3, 4, 5]),
        ("aaabbc", 9, [0, 1, 2, 3, 4, 5]),
        ("aaabbc", None, [0, 1, 2, 3, 4, 5]),
        ("cba", 2, [0, 1]),
    ],
)
def test_a_limit_is_spread_over_the_categories(categories: str, limit: int | None, kept: list[int]) -> None:
    assert [int(prompt.prompt_id) for prompt in spread(prompts_of(categories), limit)] == kept


@given(st.text("abc", min_size=1, max_size=30), st.integers(1, 40))
def test_a_limit_keeps_order_and_balance(categories: str, limit: int) -> None:
    everything = prompts_of(categories)
    kept = spread(everything, limit)
    assert len(kept) == min(limit, len(everything))
    assert list(kept) == sorted(kept, key=everything.index)
    taken = {name: sum(prompt.category == name for prompt in kept) for name in categories}
    for name, other in ((one, two) for one in taken for two in taken):
        assert taken[name] >= taken[other] - 1 or taken[name] == categories.count(name)


@given(
    st.lists(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"]), min_size=1)}), min_size=1)
)
def test_any_json_text_is_taken_or_refused_with_a_line(rows: list[dict[str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        usable = [row["text"].strip() for row in rows if row["text"].strip() and "\x00" not in row["text"]]
        if usable:
            loaded = load_prompts(str(path), skip_bad_rows=True)
            assert [prompt.text for prompt in loaded.prompts] == usable
            assert len(loaded.skipped_rows) == len(rows) - len(usable)
        else:
            with pytest.raises(UserError, match="no usable prompt"):
                load_prompts(str(path), skip_bad_rows=True)


def test_sampled_answers_fill_only_the_gaps() -> None:
    filled = with_answers(
        [*TWO, Prompt(prompt_id="c", text="t", behaviour="beh", style="sty")], {"a": "other", "b": "new"}
    )
    assert [prompt.answer for prompt in filled] == ["Yes.", "new", None]
    assert (filled[2].behaviour, filled[2].style) == ("beh", "sty")
