"""`python -m deepalign.training`: a run from a file of settings, on one process and on two; mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepalign.errors import UserError
from deepalign.training.__main__ import chosen_checkpoint, load_rows, main, parse

ROOT = Path(__file__).resolve().parents[2]
MODULE = "deepalign.training"
ONE_PROCESS = ("-m", MODULE)
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", MODULE)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> dict[str, Any]:
    """Of a run of four steps over eight short rows."""
    rows = tmp_path / "rows.jsonl"
    answers = ("Mix the flour with water.", "Let the dough rest for an hour.")
    with rows.open("w", encoding="utf-8") as file:
        for number in range(8):
            prompt = [{"role": "user", "content": f"How do I bake bread {number}?"}]
            completion = [{"role": "assistant", "content": answers[number % 2]}]
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return {
        "model_name_or_path": str(tiny_model_folder("model")),
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
        "reference": "precomputed",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def write(settings: dict[str, Any], folder: Path) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def start(how: tuple[str, ...], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A run as a user starts it, without a way to the hub."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *how, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **offline})


def logged(folder: Path, step: int) -> list[dict[str, Any]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_a_run_that_was_stopped_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    file = write(settings, tmp_path)
    run = Path(settings["output_dir"])

    assert main(["--config", str(file), "--max_steps", "2"]) == 0
    first = logged(run, 2)
    # Cut off while it was being written.
    (run / "checkpoint-3").mkdir()
    assert main(["--config", str(file)]) == 0

    entries = logged(run, 4)
    assert entries[:2] == first
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0]["constraint/weight_first"] == 1.0
    assert entries[3]["constraint/log_ratio"] > 0.0, "the reference is the model before training, not the checkpoint"
    assert (run / "model.safetensors").is_file()
    assert len(list((run / "reference").iterdir())) == 1


def test_two_processes_do_what_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"train_sampling_strategy": "sequential", "max_steps": 2}
    file = write(settings, tmp_path)
    two, one = tmp_path / "two", tmp_path / "one"

    done = start(TWO_PROCESSES, "--config", file, "--output_dir", two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["--config", str(file), "--output_dir", str(one), "--per_device_train_batch_size", "4"]) == 0

    for ours, theirs in zip(logged(two, 2), logged(one, 2), strict=True):
        for name in ("loss", "grad_norm", "constraint/objective"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_a_mistake_is_one_line_and_status_2(settings: dict[str, Any], tmp_path: Path) -> None:
    done = start(ONE_PROCESS, "--config", write(settings, tmp_path), "--beta_first", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("deepalign.training: beta_first is 0.0; ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset_name": "missing.jsonl"}, "there is no file missing.jsonl"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"model_name_or_path": "/missing/model"}, "there is no folder /missing/model"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"num_early": "many"}, "argument --num_early"),
        ({"beta_early": [2.0]}, "a setting has a value of another kind"),
        ({"reduction": "sum"}, "reduction='sum' is unknown"),
        ({"beta_fist": 0.5}, "beta_fist"),
        ({"eval_strategy": "steps"}, "has no split for evaluation"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"resume_from_checkpoint": "missing"}, "resume_from_checkpoint=missing is no whole checkpoint"),
    ],
)
def test_a_bad_setting(
    changes: dict[str, Any], told: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write(settings | changes, tmp_path))]) == 2
    line = capsys.readouterr().err
    assert told in line.splitlines()[-1]
    assert "Traceback" not in line


def test_a_missing_or_broken_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*missing.yaml"):
        parse(["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(UserError, match="needs a file"):
        parse(["--config"])
    (tmp_path / "broken.yaml").write_text("beta_first: [", encoding="utf-8")
    with pytest.raises(UserError, match="no YAML"):
        parse(["--config", str(tmp_path / "broken.yaml")])


def test_data_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for name in ("train", "test"):
        (tmp_path / "both" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n', encoding="utf-8")
    assert [rows["text"] for rows in load_rows(str(tmp_path / "both"), ["train", "test"])] == [["train"], ["test"]]
    (tmp_path / "rows.csv").write_text("text\none\n", encoding="utf-8")
    assert load_rows(str(tmp_path / "rows.csv"), ["train"])[0]["text"] == ["one"]

    with pytest.raises(UserError, match=r"no split 'other'; there are (test, train|train, test)"):
        load_rows(str(tmp_path / "both"), ["other"])
    for name, text, told in (("empty", "", "is empty"), ("broken", "x{\n", "cannot be read")):
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            load_rows(str(tmp_path / f"{name}.jsonl"), ["train"])


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert chosen_checkpoint(str(tmp_path)) is None
    for number, state in ((9, "{}"), (10, "{}"), (11, "{"), (12, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert chosen_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert chosen_checkpoint(str(tmp_path), "false") is None
    assert chosen_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")


def test_the_example_holds_the_papers_settings(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "configs" / "constrained_sft.yaml").read_text(encoding="utf-8"))
    file = write(settings | {"use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}, tmp_path)
    _, args, _ = parse(["--config", str(file)])
    strength = args.strength
    assert (strength.first, strength.early, strength.rest, strength.num_early) == (0.5, 2.0, 0.1, 5)
    assert (args.learning_rate, args.warmup_steps, args.adam_beta1, args.adam_beta2) == (2e-5, 10, 0.5, 0.999)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 2
    assert file.read_text(encoding="utf-8").startswith("# ")
