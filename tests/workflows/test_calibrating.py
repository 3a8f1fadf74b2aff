"""Labels beside a run: what is computed, what is drawn, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from deepalign.errors import UserError
from deepalign.records import Attempt, Completion, Message, Verdict, to_jsonl
from deepalign.workflows.calibrating import calibrate, read_labels, write_sample

HEAD = "prompt_id,attack,variant,sample,label\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"config": {}}')
    keys = [{"prompt_id": f"p{n}", "attack": "prefill", "variant": f"k={n % 2}", "sample": 0} for n in range(40)]
    attempts = [Attempt(**key, model="target", messages=(Message(role="user", content="Ask?"),)) for key in keys]
    verdicts = [
        Verdict(**key, judge="refusal", status="complied" if n < 20 else "refused", outcome="complied")
        for n, key in enumerate(keys)
    ]
    (folder / "attempts.jsonl").write_text(to_jsonl(attempts))
    (folder / "completions.jsonl").write_text(to_jsonl([Completion(**key, status="ok", text="Sure.") for key in keys]))
    (folder / "verdicts.refusal.jsonl").write_text(to_jsonl(verdicts))
    return folder


def test_rates_are_corrected_by_the_labels(run: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    # Of ten harmful the judge finds eight (p0-p7, not p20, p21); of ten refused it leaves nine (p22-p30, not p8).
    harmful, refused = [*range(8), 20, 21], [8, *range(22, 31)]
    rows = [(n, "harmful") for n in harmful] + [(n, "refused") for n in refused]
    labels.write_text(HEAD + "".join(f"p{n},prefill,k={n % 2},0,{label}\n" for n, label in rows))
    data = calibrate(run, labels, None)
    assert (data["sensitivity"]["rate"], data["specificity"]["rate"]) == (0.8, 0.9)
    assert data["rates"][0]["corrected"] == pytest.approx((0.5 + 0.9 - 1) / 0.7)
    assert json.loads((run / "calibration.refusal.json").read_text())["num_labels"] == 20


def test_sample_has_the_shares_of_the_run(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    assert write_sample(run, file, 20, None) == 20
    rows = list(csv.DictReader(file.open()))
    assert sum(int(row["prompt_id"][1:]) < 20 for row in rows) == 10
    assert sum(row["variant"] == "k=0" for row in rows) == 10
    with pytest.raises(UserError, match="holds no labels"):
        read_labels(file)
    with pytest.raises(UserError, match="exists"):
        write_sample(run, file, 20, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no labels"),
        (HEAD + "p0,prefill,k=0,0,bad\n", "label 'bad' is none of"),
        (HEAD + "p0,prefill,k=0,x,harmful\n", "not a whole number"),
        (HEAD + "p0,prefill,k=0,0,harmful\n" * 2, "labelled twice"),
        ("prompt_id,attack,variant,sample\np0,prefill,k=0,0\n", "no 'label'"),
        (HEAD + "q0,prefill,k=0,0,harmful\n", "another run"),
    ],
)
def test_bad_labels_are_one_line(run: Path, tmp_path: Path, text: str, says: str) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    with pytest.raises(UserError, match=says):
        calibrate(run, labels, None)
