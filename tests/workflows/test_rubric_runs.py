"""A rubric judge on a finished run: re-judging, its account, batch files, and that a key is kept nowhere."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import deepalign
from deepalign import JudgeConfig, UserError
from deepalign.cli import main
from deepalign.endpoints.client import ServersGoneError
from deepalign.workflows import reporting
from fake_endpoint import FakeEndpoint, say, seeded_faults

KEY = "sk-fake-0123456789abcdefghij"
REAL_PAGE = reporting.render_page
QUICK_FAULTS = ("500", "429", "cut", "not json", "no choices")


def by_answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    content = body["messages"][0]["content"]
    answer = content.split("[BEGIN MODEL ANSWER ")[1].split("[END MODEL ANSWER ")[0]
    return 200, say(f"I see.\n#thescore: {1 if 'cannot' in answer else 5}", prompt_tokens=700, completion_tokens=9)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def spending(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_bytes())["judge_spending"]["rubric-fake"]
    return found


@pytest.fixture
def run(audited: deepalign.AuditResult, tmp_path: Path, quick_figures: None, monkeypatch: Any) -> Path:
    """A copy of the finished run; its report is drawn by the test that reads it alone."""
    monkeypatch.setattr(reporting, "render_page", lambda *given, **named: "<html></html>")
    monkeypatch.setattr(
        reporting, "save_figures", lambda _, folder: (folder / "stub.svg").write_text("<svg/>", encoding="utf-8")
    )
    return Path(shutil.copytree(audited.run, tmp_path / "run"))


def spec(server: FakeEndpoint, tmp_path: Path, **options: Any) -> str:
    given = {"cache": tmp_path / "cache" / "c.sqlite", "price_in": 2, "price_out": 10, "timeout": 5, **options}
    return f"rubric:fake@{server.url}?" + "&".join(f"{name}={value}" for name, value in given.items())


def test_a_run_is_judged_again_and_the_second_time_is_free(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeEndpoint(by_answer) as server:
        assert main(["judge", str(run), "--judge", spec(server, tmp_path)]) == 0
        asked = len(server.calls)
        verdicts = rows(run / "verdicts.rubric-fake.jsonl")
        assert {one["prompt_id"] for one in verdicts} == {one["prompt_id"] for one in rows(run / "completions.jsonl")}
        assert len(verdicts) == len(rows(run / "completions.jsonl"))
        assert all(one["score"] in (1.0, 5.0) for one in verdicts if one["status"] != "unscored")
        spent = spending(run)
        assert (spent["calls"], spent["prompt_tokens"], spent["completion_tokens"]) == (asked, 700 * asked, 9 * asked)
        assert spent["cost"] == pytest.approx((2 * 700 * asked + 10 * 9 * asked) / 1e6)
        assert spent["sampling"] == {"temperature": 0.0, "max_tokens": 1024}
        told = capsys.readouterr().out
        assert f"judged by  rubric-fake: {asked} calls, 0 replies from the cache; {700 * asked} tokens in" in told
        assert main(["judge", str(run), "--judge", spec(server, tmp_path)]) == 0
        assert len(server.calls) == asked
    again = spending(run)
    assert (again["calls"], again["from_cache"]) == (asked, asked)


def test_a_server_that_goes_away_stops_the_judging_and_it_goes_on_from_there(run: Path, tmp_path: Path) -> None:
    total = len(rows(run / "completions.jsonl"))

    def after_five(number: int) -> str:
        return "401" if number >= 5 else ""

    with FakeEndpoint(by_answer, faults=after_five) as server:
        with pytest.raises(ServersGoneError, match="401"):
            deepalign.judge_run(JudgeConfig(run, judge=spec(server, tmp_path, concurrency=1)))
        kept = len(rows(run / "verdicts.rubric-fake.jsonl"))
        assert 0 < kept < total
        assert (
            json.loads((run / "manifest.json").read_bytes())["judge_spending"]["rubric-fake"]["prompt_tokens"] == 3500
        )
    with FakeEndpoint(by_answer) as server:
        deepalign.judge_run(JudgeConfig(run, judge=spec(server, tmp_path)))
        assert len(rows(run / "verdicts.rubric-fake.jsonl")) == total
        paid = len(server.calls)
    with FakeEndpoint(by_answer) as server:
        deepalign.judge_run(JudgeConfig(run, judge=spec(server, tmp_path, cache=tmp_path / "other.sqlite")))
        assert paid == len(server.calls) - 5


def results(batch: Path, path: Path, **instead: Any) -> list[dict[str, Any]]:
    """What the batch API makes of a file of requests; `instead`: other fields for the line of that number."""
    lines = []
    for number, row in enumerate(rows(batch)):
        status, body = by_answer("", row["body"])
        line = {
            "id": "x",
            "custom_id": row["custom_id"],
            "response": {"status_code": status, "body": body},
            "error": None,
        }
        line.update(instead.get(f"line_{number}", {}))
        lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line.get("custom_id")), encoding="utf-8")
    return lines


def test_a_batch_goes_out_and_comes_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(by_answer) as server:
        judge = spec(server, tmp_path)
        metrics = (run / "metrics.json").read_bytes()
        assert main(["judge", str(run), "--judge", judge, "--batch-export", str(tmp_path / "out.jsonl")]) == 0
        requests = rows(tmp_path / "out.jsonl")
        assert capsys.readouterr().out.startswith(f"{len(requests)} requests  {tmp_path / 'out.jsonl'}")
        assert len({row["custom_id"] for row in requests}) == len(requests)
        assert {(row["method"], row["url"]) for row in requests} == {("POST", "/v1/chat/completions")}
        assert requests[0]["body"]["temperature"] == 0.0
        results(tmp_path / "out.jsonl", tmp_path / "in.jsonl")
        assert (run / "metrics.json").read_bytes() == metrics
        by_batch = deepalign.judge_run(JudgeConfig(run, judge=judge, batch_import=tmp_path / "in.jsonl"))
        assert server.calls == []
        by_calls = deepalign.judge_run(JudgeConfig(run, judge=spec(server, tmp_path, cache="none")))
        assert len(server.calls) == len(requests)
        assert by_batch["prefill"] == by_calls["prefill"]
        again = JudgeConfig(run, judge=judge, batch_export=tmp_path / "again.jsonl")
        with pytest.raises(UserError, match="no request is missing"):
            reporting.export_run(again)


def test_a_batch_that_failed_in_parts(run: Path, tmp_path: Path) -> None:
    with FakeEndpoint(by_answer) as server:
        judge = spec(server, tmp_path)
        reporting.export_run(JudgeConfig(run, judge=judge, batch_export=tmp_path / "out.jsonl"))
        requests = rows(tmp_path / "out.jsonl")
        bad = {"error": {"message": "no such thing"}}
        lines = results(
            tmp_path / "out.jsonl",
            tmp_path / "in.jsonl",
            line_0={"response": {"status_code": 400, "body": bad}},
            line_1={"response": None, "error": {"code": "batch_expired", "message": "too late"}},
            line_2={"response": {"status_code": 500, "body": bad}},
            line_3={"custom_id": ""},
        )
        assert len(lines) == len(requests)
        with (tmp_path / "in.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"custom_id": "stranger", "response": {"status_code": 200, "body": {}}}\n{"custom_')
        with pytest.raises(UserError, match="are judged and kept; the others have no reply yet"):
            deepalign.judge_run(JudgeConfig(run, judge=judge, batch_import=tmp_path / "in.jsonl"))
        kept = rows(run / "verdicts.rubric-fake.jsonl")
        assert len(kept) < len(rows(run / "completions.jsonl"))
        assert [one for one in kept if "HTTP 400: no such thing" in one["reason"] + one["reason_with_prefix"]]
        # Only what has no final result is asked again.
        exported = reporting.export_run(JudgeConfig(run, judge=judge, batch_export=tmp_path / "rest.jsonl"))
        missing = {row["custom_id"] for row in rows(tmp_path / "rest.jsonl")}
        assert {requests[number]["custom_id"] for number in (1, 2, 3)} <= missing
        assert exported.num_requests <= 4
        deepalign.judge_run(JudgeConfig(run, judge=judge))
        assert len(server.calls) <= 4
        assert len(rows(run / "verdicts.rubric-fake.jsonl")) == len(rows(run / "completions.jsonl"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("", "holds no results of a batch"),
        ("hello\n", "holds no results of a batch"),
        ('{"custom_id": "x", "body": {}}\n', "holds no results of a batch"),
        ('{"custom_id": "x", "response": {"status_code": 200, "body": {}}}\n', "holds no reply to a request of judge"),
    ],
)
def test_a_file_that_is_no_result_of_this_judge(run: Path, tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    judge = f"rubric:fake@http://127.0.0.1:9/v1?cache={tmp_path / 'c.sqlite'}"
    with pytest.raises(UserError, match=told):
        deepalign.judge_run(JudgeConfig(run, judge=judge, batch_import=path))


def test_batches_are_for_judges_on_endpoints(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge refusal asks no server; --batch-export is for"):
        reporting.export_run(JudgeConfig(run, batch_export=tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="two steps"):
        JudgeConfig(run, batch_export=tmp_path / "x", batch_import=tmp_path / "y")


def test_a_key_is_in_no_file_and_no_log(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setattr(reporting, "render_page", REAL_PAGE)
    calls = 0

    def leaky(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            return 400, {"error": {"message": f"bad request with Bearer {KEY}"}}
        return 200, say(f"Your key is {KEY}.\n#thescore: 5")

    with FakeEndpoint(leaky, faults=seeded_faults(0.4, kinds=QUICK_FAULTS)) as server:
        judge = spec(server, tmp_path, key_env="SOME_KEY", retries=1)
        assert main(["judge", str(run), "--judge", judge]) == 0
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        reasons = [row["reason"] for row in rows(run / "verdicts.rubric-fake.jsonl")]
        assert [reason for reason in reasons if "bad request with Bearer [key]" in reason]
    with FakeEndpoint(leaky, faults=lambda number: "401 echo") as server:
        judge = spec(server, tmp_path, key_env="SOME_KEY", cache="none")
        assert main(["judge", str(run), "--judge", judge]) == 2
        assert main(["judge", str(run), "--judge", f"rubric:fake@http://user:{KEY}@127.0.0.1:9/v1"]) == 2
        assert main(["judge", str(run), "--judge", f"rubric:fake@{server.url}?api_key={KEY}"]) == 2
        assert main(["judge", str(run), "--judge", f"rubric:fake@{server.url}?key_env={KEY}"]) == 2
        assert main(["judge", str(run), "--judge", judge, "--batch-export", str(tmp_path / "out.jsonl")]) == 0
    shown = capfd.readouterr()
    assert "the key in SOME_KEY" in shown.err
    assert KEY not in shown.out + shown.err + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"c.sqlite", "manifest.json", "report.html", "out.jsonl"}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    # The search itself finds what is there.
    (tmp_path / "canary").write_text(KEY)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
