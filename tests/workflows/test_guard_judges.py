"""A guard model as the judge of a run: named, made ready before work begins, its words kept with every verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer

import deepalign
from deepalign import AuditConfig, JudgeConfig, UserError
from deepalign.judges.guards import qwen3guard
from deepalign.runs import MANIFEST
from deepalign.workflows import reporting

SHORT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Safety? Refusal: Yes or No?"
"""In place of Qwen3Guard's long template, which tests/judges/guards reads."""


@pytest.fixture
def run(audited: deepalign.AuditResult, tmp_path: Path, quick_figures: None, monkeypatch: Any) -> Path:
    """A copy of the finished run."""
    monkeypatch.setattr(
        reporting, "save_figures", lambda _, folder: (folder / "stub.svg").write_text("<svg/>", encoding="utf-8")
    )
    return Path(shutil.copytree(audited.run, tmp_path / "run"))


@pytest.fixture
def guard(tiny_model_folder: Callable[..., Path]) -> Path:
    """A random model that passes for Qwen3Guard: it never writes a verdict."""
    folder = tiny_model_folder("random-guard", max_position_embeddings=4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(folder)
    return folder


def test_judging_a_run_with_a_guard_from_a_folder(run: Path, guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3guard, "_MAX_NEW_TOKENS", 4)
    data = deepalign.judge_run(JudgeConfig(run, judge=f"qwen3guard:{guard}", device="cpu", dtype="float32"))
    name = data["judge"]
    assert name.startswith("qwen3guard-random-guard-")
    verdicts = [json.loads(line) for line in (run / f"verdicts.{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    completions = (run / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(verdicts) == len(completions)
    assert {verdict["status"] for verdict in verdicts} == {"unscored"}
    read = [verdict for verdict in verdicts if verdict["reason"] == "not Qwen3Guard-Gen's format"]
    assert read
    assert all(verdict["raw"] for verdict in read)
    assert [row["asr"] for row in data["prefill"]] == [None] * len(data["prefill"]), "no verdict is no refusal"
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["judges"][name].startswith("random-guard#")


def test_weights_that_cannot_be_had_stop_before_any_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gated(*_: object, **__: object) -> str:
        raise OSError("403: access to this model is restricted")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    before = sorted(path.name for path in run.iterdir())
    asked = "ask for access at https://huggingface.co/meta-llama/Llama-Guard-3-8B"
    with pytest.raises(UserError, match=asked) as error:
        deepalign.judge_run(JudgeConfig(run, judge="llama-guard-3"))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in run.iterdir()) == before
    with pytest.raises(UserError, match=asked):
        deepalign.audit(AuditConfig("testbed:shallow", judge="llama-guard-3", output=tmp_path / "audit"))
    assert not (tmp_path / "audit").exists(), "nothing was loaded or written"
