"""Judging a run again, its report, and reports that compare runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import deepalign
from deepalign import JudgeConfig, ReportConfig, UserError
from deepalign.records import JudgeInput, Ruling
from deepalign.workflows import reporting


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def run(audited: deepalign.AuditResult, tmp_path: Path, quick_figures: None, monkeypatch: Any) -> Path:
    """A copy of the finished run."""
    monkeypatch.setattr(
        reporting, "save_figures", lambda _, folder: (folder / "stub.svg").write_text("<svg/>", encoding="utf-8")
    )
    return Path(shutil.copytree(audited.run, tmp_path / "run"))


@pytest.fixture
def label(run: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes one label for every text of the run; returns the judge's name."""

    def write(status: str, name: str = "labels.jsonl") -> str:
        texts = {row["text"] for row in rows(run, "completions.jsonl")}
        lines = [json.dumps({"response": text, "status": status}) for text in sorted(texts)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return f"scripted:{tmp_path / name}"

    return write


def asr(data: dict[str, Any]) -> list[float | None]:
    return [row["asr"] for row in data["prefill"]]


def test_judging_again_keeps_the_completions_and_the_first_verdicts(run: Path, label: Callable[..., str]) -> None:
    kept = {
        name: (run / name).read_bytes()
        for name in ("completions.jsonl", "attempts.jsonl", "verdicts.refusal.jsonl", "metrics.refusal.json")
    }
    data = deepalign.judge_run(JudgeConfig(run, judge=label("complied")))
    assert asr(data) == [1.0, 1.0, 1.0, 1.0]
    assert data["judge"] == data["run_card"]["judge"] == "scripted"
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert json.loads((run / "metrics.json").read_bytes()) == data
    assert json.loads((run / "metrics.scripted.json").read_bytes()) == data
    assert len(rows(run, "verdicts.scripted.jsonl")) == len(rows(run, "completions.jsonl"))
    assert "scripted" in (run / "report.html").read_text(encoding="utf-8")
    back = deepalign.judge_run(JudgeConfig(run))
    assert asr(back) == [0.0, 1.0, 1.0, 1.0]


def test_labels_that_were_mended_count(run: Path, label: Callable[..., str]) -> None:
    name = label("complied")
    assert asr(deepalign.judge_run(JudgeConfig(run, judge=name))) == [1.0] * 4
    assert label("refused") == name
    assert asr(deepalign.judge_run(JudgeConfig(run, judge=name))) == [0.0] * 4
    other = label("complied", "other.jsonl")
    assert asr(deepalign.judge_run(JudgeConfig(run, judge=other))) == [1.0] * 4


class Flaky:
    """Fails for as long as it is told to."""

    name = "flaky"
    down = True
    calls = 0

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        type(self).calls += 1
        if type(self).down:
            raise ConnectionError("no network")
        return [Ruling(status="refused", outcome="refused_at_once") for _ in items]


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Flaky, "down", True)
    monkeypatch.setattr(Flaky, "calls", 0)
    monkeypatch.setitem(sys.modules, "flaky_judges", sys.modules[__name__])
    return "flaky_judges:Flaky"


def test_a_judge_that_failed_is_asked_again(run: Path, flaky: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = deepalign.judge_run(JudgeConfig(run, judge=flaky))
    assert asr(data) == [None] * 4
    assert data["unscored"][0]["reason"] == "the judge failed: ConnectionError: no network"
    monkeypatch.setattr(Flaky, "down", False)
    data = deepalign.judge_run(JudgeConfig(run, judge=flaky))
    assert asr(data) == [0.0] * 4
    assert data["unscored"] == []
    verdicts = rows(run, "verdicts.flaky.jsonl")
    assert len(verdicts) == len(rows(run, "completions.jsonl")) == len({str(sorted(row.items())) for row in verdicts})


def test_an_interrupted_judging_goes_on(run: Path, flaky: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge may be slow and paid for: what it has ruled on is not asked again."""
    monkeypatch.setattr(Flaky, "down", False)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "judging" and 0 < done < total:
            raise KeyboardInterrupt

    monkeypatch.setattr("deepalign.workflows.judging._BATCH", 16)
    with pytest.raises(KeyboardInterrupt):
        deepalign.judge_run(JudgeConfig(run, judge=flaky), stop)
    first = (run / "verdicts.flaky.jsonl").read_bytes()
    assert first.count(b"\n") == 16
    deepalign.judge_run(JudgeConfig(run, judge=flaky))
    assert (run / "verdicts.flaky.jsonl").read_bytes().startswith(first)
    batches = -(-len(rows(run, "completions.jsonl")) // 16)
    assert Flaky.calls == batches, "one call for the texts of a batch, alone and with their prefill"


def test_a_newer_version_of_a_judge_rules_on_everything_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((run / "manifest.json").read_bytes())
    assert manifest["judges"] == {"refusal": "refusal-2"}
    stale = rows(run, "verdicts.refusal.jsonl")
    lines = [json.dumps({**row, "status": "refused", "outcome": "refused_at_once"}) + "\n" for row in stale]
    (run / "verdicts.refusal.jsonl").write_text("".join(lines), encoding="utf-8")
    manifest["judges"] = {"refusal": "refusal-0"}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert asr(deepalign.judge_run(JudgeConfig(run))) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("lost", ["half of the completions", "the metrics"])
def test_an_unfinished_run_is_neither_judged_nor_reported(run: Path, lost: str) -> None:
    if lost == "the metrics":
        (run / "metrics.json").unlink()
    else:
        # As a kill in the middle leaves it: no metrics were ever written.
        lines = (run / "completions.jsonl").read_bytes().splitlines(keepends=True)
        (run / "completions.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
        (run / "metrics.json").unlink()
    for use in (lambda: deepalign.judge_run(JudgeConfig(run)), lambda: deepalign.report_runs(ReportConfig((run,)))):
        with pytest.raises(UserError, match="has not finished; run the same audit again") as caught:
            use()
        assert str(run) in str(caught.value)
    assert not (run / "metrics.json").exists()


def test_a_damaged_metrics_file_is_mended_by_judging(run: Path) -> None:
    (run / "metrics.json").write_text('{"prefill": [')
    with pytest.raises(UserError, match="deepalign judge"):
        deepalign.report_runs(ReportConfig((run,)))
    deepalign.judge_run(JudgeConfig(run))
    assert deepalign.report_runs(ReportConfig((run,))) == run / "report.html"


def test_a_metrics_file_that_holds_something_else(run: Path) -> None:
    (run / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match=r"metrics\.json"):
        deepalign.report_runs(ReportConfig((run,)))


def text_of(page: Path) -> str:
    """What a reader sees, with entities resolved."""
    import html

    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_no_completion_stands_in_the_report_unless_asked_for(run: Path) -> None:
    secret = "the light; third, count to"
    assert any(secret in row["text"] for row in rows(run, "completions.jsonl"))
    page = run / "report.html"
    assert secret not in text_of(page)
    assert "redacted" in text_of(page).lower()
    deepalign.report_runs(ReportConfig((run,), show_completions=True))
    assert secret in text_of(page)
    deepalign.judge_run(JudgeConfig(run))
    assert secret not in text_of(page)
    deepalign.judge_run(JudgeConfig(run, show_completions=True))
    assert secret in text_of(page)
    deepalign.report_runs(ReportConfig((run,)))
    assert secret not in text_of(page)


def test_a_report_written_anew_is_the_audits(run: Path, audited: deepalign.AuditResult) -> None:
    (run / "report.html").unlink()
    assert deepalign.report_runs(ReportConfig((run,))) == run / "report.html"
    assert (run / "report.html").read_bytes() == audited.report.read_bytes()


def test_examples_are_few_and_of_each_category(run: Path) -> None:
    shown = reporting.examples(reporting.RunFolder(run), "refusal")
    assert [(row["category"], row["k"]) for row in shown] == [
        (category, k) for category in ("fraud", "theft", "privacy") for k in (0, 10, 20)
    ]
    assert all(row["status"] == ("refused" if row["k"] == 0 else "complied") for row in shown)


def test_two_runs_on_one_page(run: Path, tmp_path: Path, label: Callable[..., str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    deepalign.judge_run(JudgeConfig(other, judge=label("refused")))
    before = (run / "report.html").read_bytes()
    page = deepalign.report_runs(ReportConfig((run, other)))
    assert page == run / "comparison.html"
    assert (run / "report.html").read_bytes() == before
    text = text_of(page)
    assert "(run 1)" in text
    assert "(run 2)" in text
    assert "100.0 %" in text
    assert (run / "comparison-figures" / "stub.svg").exists()


def test_the_page_goes_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    page = deepalign.report_runs(ReportConfig((run,), output=tmp_path / "new" / "folder" / "page.html"))
    assert page.exists()
    assert (page.parent / "figures" / "stub.svg").exists()
    page = deepalign.report_runs(ReportConfig((run,), output=tmp_path / "bare" / "page.html", figures=False))
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("place", ["file/below/page.html", "folder"])
def test_a_page_that_cannot_be_written(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        deepalign.report_runs(ReportConfig((run,), output=tmp_path / place))
    assert list((tmp_path / "folder").iterdir()) == []


def test_no_runs_at_all() -> None:
    with pytest.raises(UserError, match="at least one run"):
        deepalign.report_runs(ReportConfig(()))


@pytest.mark.parametrize("stale", [False, True])
def test_without_matplotlib_the_page_alone_must_do(run: Path, stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("matplotlib is missing; pip install 'deepalign[report]'")

    monkeypatch.setattr(reporting, "save_figures", missing)
    shutil.rmtree(run / "figures")
    if stale:
        (run / "figures").mkdir()
        (run / "figures" / "old.svg").write_text("<svg/>")
    assert deepalign.report_runs(ReportConfig((run,))).exists()
    assert (run / "figures").exists() is stale


def test_the_real_figures_are_there(audited: deepalign.AuditResult) -> None:
    names = {path.name for path in (audited.run / "figures").iterdir()}
    assert {name.rsplit(".", 1)[1] for name in names} == {"svg", "png"}
    stems = {name.rsplit(".", 1)[0] for name in names}
    assert {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")} == names
    assert all((audited.run / "figures" / name).stat().st_size > 1000 for name in names)


def test_only_one_process_judges(run: Path) -> None:
    from filelock import FileLock

    with FileLock(run / ".lock"), pytest.raises(UserError, match="another process"):
        deepalign.judge_run(JudgeConfig(run))
