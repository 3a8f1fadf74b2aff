"""Scripted verdicts and the table of judges."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from deepalign.errors import UserError
from deepalign.judges import JUDGES, SPECS, Judge, get_judge, known_judges
from deepalign.judges.refusal import RefusalJudge
from deepalign.judges.scripted import ScriptedJudge
from deepalign.records import JudgeInput, Ruling


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rule(judge: Judge, *responses: str) -> list[Ruling]:
    return judge.judge([JudgeInput(prompt="p", response=response) for response in responses])


def test_rows_become_rulings_in_the_order_asked(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "labels.jsonl",
        [
            {"response": "no\u2028", "status": "refused"},
            {"response": "sure", "status": "complied", "reason": "by hand"},
            {"response": "a b. no", "status": "refused", "outcome": "recovered", "refusal_char": 5},
            {"response": "", "status": "unscored", "outcome": None},
        ],
    )
    judge = ScriptedJudge.from_file(path)
    assert judge.name == "scripted"
    assert rule(judge, "sure", "a b. no", "no\u2028", "", "never seen") == [
        Ruling(status="complied", outcome="complied", reason="by hand"),
        Ruling(status="refused", outcome="recovered", refusal_char=5),
        Ruling(status="refused", outcome="refused_at_once"),
        Ruling(status="unscored", outcome="unscored"),
        Ruling(status="unscored", outcome="unscored", reason="no scripted verdict"),
    ]


def test_a_mapping_is_copied() -> None:
    rulings = {"x": Ruling(status="refused", outcome="refused_at_once")}
    judge = ScriptedJudge(rulings)
    rulings.clear()
    assert rule(judge, "x")[0].status == "refused"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        ScriptedJudge.from_file(tmp_path / "nowhere.jsonl")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.jsonl"):
        ScriptedJudge.from_file(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"status": "refused"}', '"response" is None'),
        ('{"response": 3, "status": "refused"}', '"response" is 3'),
        ('{"response": "x"}', '"status" is None'),
        ('{"response": "x", "status": "maybe"}', "'maybe'; give one of refused, complied, unscored"),
        ('{"response": "x", "status": ["refused"]}', '"status" is'),
        ('{"response": "x", "status": "refused", "outcome": "complied"}', "refused_at_once or recovered"),
        ('{"response": "x", "status": "refused", "reason": 1}', '"reason" is 1'),
        ('{"response": "x", "status": "refused", "refusal_char": 1}', '"refusal_char" is 1'),
        ('{"response": "x", "status": "refused", "refusal_char": true}', '"refusal_char" is True'),
        ('{"response": "x", "status": "refused", "refusal_char": -1}', '"refusal_char" is -1'),
        ('{"response": "x", "state": "refused", "status": "refused"}', "unknown field 'state'"),
        ('{"response": "fine", "status": "complied"}', "another verdict"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"response": "fine", "status": "refused"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ScriptedJudge.from_file(path)
    assert message in str(caught.value)
    assert "line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_built_in_judge_loads_under_its_name() -> None:
    for name in JUDGES:
        judge = get_judge(name)
        assert isinstance(judge, Judge)
        assert judge.name == name
    assert isinstance(get_judge("refusal"), RefusalJudge)


def test_a_scripted_judge_is_loaded_from_its_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a:b.jsonl", [{"response": "x", "status": "refused"}])
    assert rule(get_judge(f"scripted:{path}"), "x")[0].status == "refused"


def test_every_judge_can_be_found_in_the_list() -> None:
    listed = known_judges()
    assert set(JUDGES) <= set(listed)
    assert "scripted:FILE" in listed
    assert all(about and "\n" not in about for about in listed.values())
    assert {form.partition(":")[0] for form in listed} == {*JUDGES, *SPECS, "module"}


def test_a_name_in_both_tables_takes_its_default_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def of(rest: str) -> Judge:
        told.append(rest)
        return RefusalJudge()

    monkeypatch.setitem(JUDGES, "both", lambda: of("default"))
    monkeypatch.setitem(SPECS, "both", of)
    get_judge("both")
    get_judge("both:org/model@http://host:1/v1")
    assert told == ["default", "org/model@http://host:1/v1"]
    with pytest.raises(UserError, match="unknown judge 'both:'"):
        get_judge("both:")


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "judge_of_a_user"
    (tmp_path / f"{name}.py").write_text(
        "class Always:\n    name = 'always'\n    def judge(self, items):\n        return []\n"
        "ready = Always()\nclass NoJudge:\n    name = 'x'\n"
        "class Broken:\n    def __init__(self):\n        raise RuntimeError('no\\nkey')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_class_or_an_object_is_imported_by_path(user_module: str) -> None:
    assert get_judge(f"{user_module}:Always").name == "always"
    assert get_judge(f"{user_module}:ready").name == "always"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("refusel", "did you mean refusal"),
        ("scriptd:x", "did you mean scripted:FILE?"),
        ("scripted:", "did you mean scripted:FILE?"),
        ("", "unknown judge ''"),
        ("scripted", "scripted:FILE"),
        ("scripted:", "scripted:FILE"),
        (":Name", "unknown judge"),
        ("no_such_module:Name", "No module named 'no_such_module'"),
        ("judge_of_a_user:Missing", "Missing"),
        ("judge_of_a_user:NoJudge", "has no `name` and `judge(items)`"),
        ("judge_of_a_user:Broken", "no key"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_anything_else_is_refused_in_one_line(name: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        get_judge(name)
    message = str(caught.value)
    assert part in message
    assert repr(name) in message
    assert "refusal" in message
    assert "module:Name" in message
    assert "\n" not in message
