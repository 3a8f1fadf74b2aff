"""A panel on a finished run: nothing is generated, each judge's verdicts are kept, and the majority is the headline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import deepalign
from deepalign import cli
from deepalign.config_reports import JudgeConfig
from deepalign.errors import UserError
from deepalign.records import JudgeInput, Ruling
from deepalign.workflows import reporting
from deepalign.workflows.reporting import judge_run

ALL_BUT_ONE = 3


class Harm:
    """Finds harm wherever the last letter is even; says nothing of refusals."""

    name = "harm"
    tells_refusals = False
    asked = 0

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        type(self).asked += len(items)
        held = Ruling(status="refused", outcome="held", score=0.0)
        found = Ruling(status="complied", outcome="complied", score=1.0)
        return [found if len(item.response) % 2 == 0 else held for item in items]


class Never(Harm):
    name = "never"

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        return [Ruling(status="refused", outcome="held") for _ in items]


class Silent(Harm):
    name = "silent"

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        raise RuntimeError("no network")


class Mute(Silent):
    name = "mute"


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures beside the page, which take seconds for each run."""
    monkeypatch.setattr(reporting, "save_figures", lambda *_, **__: None)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is drawn, which takes seconds for each run."""
    monkeypatch.setattr(reporting, "render_page", lambda *_, **__: "<html></html>")


@pytest.fixture
def copy(audited: deepalign.AuditResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited.run, tmp_path / "run"))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


PANEL = f"refusal,{__name__}:Harm,{__name__}:Never"


def test_a_finished_audit_is_judged_by_a_panel(copy: Path) -> None:
    written = (copy / "completions.jsonl").read_bytes()
    before = (copy / "verdicts.refusal.jsonl").read_bytes()
    data = judge_run(JudgeConfig(run=copy, judge=PANEL))
    assert (copy / "completions.jsonl").read_bytes() == written
    assert (copy / "verdicts.refusal.jsonl").read_bytes() == before
    assert data["judge"] == "majority"
    assert data["panel"]["judges"] == ["refusal", "harm", "never"]
    assert {row["judge"] for row in data["panel"]["rates"]} == {"refusal", "harm", "never", "majority"}
    assert len(data["panel"]["pairs"]) == 3
    votes = [
        {tuple(row[name] for name in ("prompt_id", "attack", "variant", "sample")): row["status"] for row in found}
        for found in (lines(copy, f"verdicts.{name}.jsonl") for name in ("refusal", "harm", "never", "majority"))
    ]
    assert set(votes[0]) == set(votes[1]) == set(votes[2]) == set(votes[3])
    for key, said in votes[3].items():
        cast = [vote[key] for vote in votes[:3] if vote[key] != "unscored"]
        most = max(set(cast), key=cast.count)
        assert said == (most if 2 * cast.count(most) > len(cast) and len(cast) > 1 else "unscored")
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "Agreement of the judges" in page
    assert "majority of refusal, harm, never" in page
    assert "Completions are redacted" in page


@pytest.mark.usefixtures("no_page")
def test_a_panel_pays_no_judge_twice(copy: Path) -> None:
    judge_run(JudgeConfig(run=copy, judge=PANEL))
    rows = (copy / "verdicts.harm.jsonl").read_bytes()
    cut = rows.splitlines(keepends=True)
    (copy / "verdicts.harm.jsonl").write_bytes(b"".join(cut[:-ALL_BUT_ONE]))
    Harm.asked = 0
    judge_run(JudgeConfig(run=copy, judge=PANEL))
    assert 0 < Harm.asked <= 2 * ALL_BUT_ONE
    assert (copy / "verdicts.harm.jsonl").read_bytes() == rows


@pytest.mark.usefixtures("no_page")
def test_a_judge_of_harm_makes_no_refusal_of_a_benign_answer(copy: Path) -> None:
    plain = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    data = judge_run(JudgeConfig(run=copy, judge=f"{__name__}:Never"))
    (mine,), (theirs,) = data["over_refusal"], plain["over_refusal"]
    assert mine["refusals"] == theirs["refusals"]
    assert mine["judge"] == "refusal"
    assert {row["num_recovered"] for row in data["prefill"]} == {None}
    assert {row["asr"] for row in data["prefill"]} == {0.0}


def test_the_terminal_shows_the_panel(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", str(copy), "--judge", PANEL, "--show-completions"]) == 0
    told = capsys.readouterr().out
    assert "Attack success rate by judge" in told
    assert "Fleiss" in told
    rows = [row for row in lines(copy, "completions.jsonl") if row["text"].strip()]
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert any(row["text"].strip().split("\n")[0][:20] in page for row in rows)


@pytest.mark.usefixtures("no_page")
def test_two_that_differ_about_harm_leave_over_refusal_to_the_one_that_tells_it(copy: Path) -> None:
    plain = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    data = judge_run(JudgeConfig(run=copy, judge=f"refusal,{__name__}:Never"))
    (mine,), (theirs,) = data["over_refusal"], plain["over_refusal"]
    assert mine["refusals"] == theirs["refusals"]
    assert mine["judge"] == "refusal"
    assert any("divided" in row["reason"] for row in data["unscored"])


@pytest.mark.usefixtures("no_page")
def test_people_s_labels_sit_on_a_panel(copy: Path, tmp_path: Path) -> None:
    texts = dict.fromkeys(row["text"] for row in lines(copy, "completions.jsonl"))
    labels = tmp_path / "my,labels.jsonl"
    rows = [json.dumps({"response": text, "status": "complied"}) for text in list(texts)[1:] if text.strip()]
    labels.write_text("\n".join(rows), encoding="utf-8")
    data = judge_run(JudgeConfig(run=copy, judge=f"refusal,scripted:{labels},{__name__}:Never"))
    assert data["panel"]["judges"] == ["refusal", "scripted", "never"]
    total = {row["judge"]: row["asr"] for row in data["panel"]["overall"]}
    assert total["scripted"]["rate"] == 1.0
    assert total["never"]["rate"] == 0.0
    assert total["majority"]["denominator"] + total["majority"]["num_unscored"] == (
        total["refusal"]["denominator"] + total["refusal"]["num_unscored"]
    )


def test_a_panel_that_scores_nothing_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", str(copy), "--judge", f"{__name__}:Silent,{__name__}:Mute"]) == 0
    data = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    assert {row["asr"] for row in data["prefill"]} == {None}
    assert data["panel"]["pairs"][0]["kappa"] is None
    assert data["panel"]["fleiss"]["note"] == "nothing was scored by all"
    assert data["panel"]["num_disagreements"] == 0
    told = capsys.readouterr().out + (copy / "report.html").read_text(encoding="utf-8")
    assert "undefined" in told
    assert "nan" not in told.lower().split()


@pytest.mark.parametrize("judge", ["refusal,", "refusal,refusal", "refusal,nobody"])
def test_a_bad_panel_leaves_the_run_as_it_was(copy: Path, judge: str) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    assert cli.main(["judge", str(copy), "--judge", judge]) == 2
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_the_scorer_of_decoding_is_one_judge(settings: dict[str, Any], tmp_path: Path) -> None:
    config = deepalign.AuditConfig(**settings, output=tmp_path / "run", decoding_scorer=f"refusal,{__name__}:Harm")
    with pytest.raises(UserError, match=r"--decoding-scorer .* names several judges; give one"):
        deepalign.audit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("judge", "names"), [(PANEL, ("refusal", "harm", "never", "majority")), (f"{__name__}:Never", ("refusal", "never"))]
)
@pytest.mark.usefixtures("no_page")
def test_shards_judged_by_several_merge(
    settings: dict[str, Any], tmp_path: Path, judge: str, names: tuple[str, ...]
) -> None:
    small = {**settings, "depths": (0, 5), "probes": ("prefill", "over-refusal"), "judge": judge}
    whole = deepalign.audit(deepalign.AuditConfig(**small, output=tmp_path / "whole"))
    for part in ("1/2", "2/2"):
        deepalign.audit(deepalign.AuditConfig(**small, output=tmp_path / "parts", shard=part))
    shards = sorted(path for path in tmp_path.iterdir() if path.name.startswith("parts"))
    merged = deepalign.merge_shards(deepalign.MergeConfig(tuple(shards), output=tmp_path / "merged"))
    assert merged.metrics["panel"] == whole.metrics["panel"]
    assert merged.metrics["over_refusal"] == whole.metrics["over_refusal"]
    assert {path.name for path in merged.run.glob("verdicts.*.jsonl")} == {f"verdicts.{name}.jsonl" for name in names}
