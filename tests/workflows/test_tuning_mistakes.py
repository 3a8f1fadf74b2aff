"""Every mistake with `deepen` and `finetune` ends with status 2 and one line that names the bad value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.workflows.conftest import HARMLESS, Main, Pair, write_csv

from deepalign import cli
from deepalign.training.trainer import ConstrainedSFTTrainer
from deepalign.workflows import trainers

ROW = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}
SMALL = ("--dtype", "float32", "--device", "cpu", "--no-audit")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 12, encoding="utf-8")
    return str(path)


@pytest.fixture
def harmless(tmp_path: Path) -> str:
    rows = [(f"b{i}", f"How do I bake bread {i}?") for i in range(12)]
    return write_csv(tmp_path / "harmless.csv", ("prompt_id", "text"), rows)


@pytest.fixture
def late(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs the command line on what goes wrong in the middle; returns the last line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "examples/s" not in told, "another library's progress bar"
        return told.splitlines()[-1].removeprefix("deepalign: ")

    return run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--alpha", "0"), "--alpha 0.0"),
        (("--alpha", "1.5"), "--alpha 1.5"),
        (("--dense", "1"), "--dense 1.0"),
        (("--interpolate", "0"), "--interpolate 0.0"),
        (("--share", "2"), "--share 2.0"),
        (("--longest", "0"), "--longest 0"),
        (("--epochs", "0"), "--epochs 0"),
        (("--recovery-batch", "0"), "--recovery-batch 0"),
        (("--learning-rate", "-1"), "--learning-rate -1"),
        (("--learning-rate", "nan"), "--learning-rate nan"),
        (("--lora-rank", "0"), "--lora-rank 0"),
        (("--seed", "-2"), "--seed"),
        (("--warmup-steps", "-2"), "--warmup-steps"),
        (("--method", "qlora"), "qlora"),
        (("--method", "full", "--quantize", "4bit"), "--quantize 4bit"),
        (("--method", "full", "--save", "adapter"), "--save adapter"),
        (("--prompts", "no-such-set"), "no-such-set"),
        (("--anchors", "no-such-set"), "no-such-set"),
        (("--look-alikes", "no-such-set"), "no-such-set"),
        (("--answers-from", "no-such/../model"), "no-such/../model"),
        (("--max-length", "8"), "--max-length 8"),
        (("--site", "reasoning"), "reasoning"),
    ],
)
def test_deepen(options: tuple[str, ...], named: str, mistake: Main, pair: Pair, harmless: str) -> None:
    given = {"--prompts": pair.prompts, "--anchors": harmless, "--answers-from": pair.base, "--longest": "8"}
    # A model is asked for answers only where the prompts bring none.
    given |= {"--look-alikes": pair.benign if "--answers-from" in options else "none"}
    extra = [part for name, value in given.items() if name not in options for part in (name, value)]
    assert named in mistake("deepen", pair.target, *SMALL, "--anchor-tokens", "8", *extra, *options)


def test_deepen_needs_enough_harmless_prompts(mistake: Main, pair: Pair) -> None:
    line = mistake("deepen", pair.target, *SMALL, "--prompts", pair.prompts, "--anchors", pair.benign)
    assert f"has {len(HARMLESS)} prompts; give at least 10" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--data", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--data", "."), "is a folder"),
        (("--objective", "dpo"), "dpo"),
        (("--beta-first", "0"), "--beta-first 0.0"),
        (("--num-early", "-1"), "--num-early"),
        (("--epochs", "-1"), "--epochs -1"),
        (("--batch", "0"), "--batch 0"),
        (("--max-steps", "0"), "--max-steps 0"),
        (("--adam-beta1", "1"), "--adam-beta1 1.0"),
        (("--prompt-column", "question"), "--completion-column"),
        (("--prompt-column", "q", "--completion-column", "a"), "column 'q'"),
        (("--reduction", "median"), "median"),
    ],
)
def test_finetune(options: tuple[str, ...], named: str, mistake: Main, pair: Pair, rows: str) -> None:
    given = () if "--data" in options else ("--data", rows)
    assert named in mistake("finetune", pair.target, *SMALL, *given, *options)


def test_a_base_that_cannot_be_is_found_before_training(mistake: Main, pair: Pair, rows: str) -> None:
    line = mistake("finetune", pair.target, "--data", rows, "--base", "./no-base", "--device", "cpu")
    assert "no model at ./no-base" in line


def test_finetune_needs_data(mistake: Main, pair: Pair) -> None:
    assert "--data" in mistake("finetune", pair.target)


def test_a_folder_of_something_else_is_left_alone(mistake: Main, pair: Pair, rows: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    line = mistake("finetune", pair.target, "--data", rows, *SMALL, "--output", tmp_path / "mine")
    assert "not empty (thesis.tex)" in line
    assert [path.name for path in (tmp_path / "mine").iterdir() if not path.name.startswith(".")] == ["thesis.tex"]


def test_rows_that_a_template_cannot_render(late: Main, pair: Pair, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('no system role here') if messages[0].role == 'system' }}hello")
    row = {"messages": [{"role": "system", "content": "Be brief."}, *ROW["messages"]]}
    (tmp_path / "system.jsonl").write_text((json.dumps(row) + "\n") * 12, encoding="utf-8")
    options = ("--data", tmp_path / "system.jsonl", "--chat-template", template, *SMALL)
    assert "no system role here" in late("finetune", pair.target, *options)


def test_rows_that_are_all_too_long(late: Main, pair: Pair, rows: str) -> None:
    assert "max_length=1 before their response" in late(
        "finetune", pair.target, "--data", rows, "--max-length", "1", *SMALL
    )


def test_out_of_memory_is_one_line_and_keeps_checkpoints(
    late: Main, pair: Pair, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ConstrainedSFTTrainer.compute_loss

    def starve(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(ConstrainedSFTTrainer, "compute_loss", starve)
    options = ("--data", rows, "--output", tmp_path / "run", "--batch", "4", "--save-steps", "1", *SMALL)
    line = late("finetune", pair.target, *options)
    assert "out of memory with per_device_train_batch_size=4 at step 2" in line
    assert trainers.last_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_a_full_disk_is_one_line(
    late: Main, pair: Pair, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ConstrainedSFTTrainer, "_save_checkpoint", full)
    options = ("--data", rows, "--output", tmp_path / "run", "--save-steps", "1", *SMALL)
    assert "the disk is full" in late("finetune", pair.target, *options)


def test_without_the_training_extra(mistake: Main, pair: Pair, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    assert "deepalign[train]" in mistake("finetune", pair.target, "--data", rows, *SMALL)
