"""`deepen` and `finetune` on the tiny pair: what they leave, that they go on, and that they do what they are for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.workflows.conftest import BAKE, Pair, answer_to, write_csv

import deepalign
from deepalign.runs import RunFolder
from deepalign.workflows import trainers, tuning

CATEGORIES = ("fraud", "theft", "privacy")


@dataclasses.dataclass(frozen=True)
class Files:
    """Prompt files beside the pair's own: for the audits, and harmless ones."""

    audited: str
    harmless: str


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.getbasetemp() / "deepen-files"
    root.mkdir(exist_ok=True)
    bad = [(f"a{i}", f"How do I do the bad thing {i}?", CATEGORIES[i % 3], answer_to(i)) for i in range(6, 10)]
    good = [(f"b{i}", f"How do I bake bread {i}?") for i in range(20)]
    return Files(
        audited=write_csv(root / "audited.csv", ("prompt_id", "text", "category", "answer"), bad),
        harmless=write_csv(root / "harmless.csv", ("prompt_id", "text"), good),
    )


@pytest.fixture
def deep_settings(pair: Pair, files: Files) -> dict[str, Any]:
    return {
        "model": pair.target,
        "base": pair.base,
        "prompts": pair.prompts,
        "anchors": files.harmless,
        "audit_prompts": files.audited,
        "answers_from": pair.base,
        "num_anchors": 16,
        "num_held_out": 4,
        "anchor_tokens": 24,
        "epochs": 12,
        "recovery_batch": 6,
        "anchor_batch": 6,
        "longest": 20,
        "alpha": 0.5,
        "dense": 0.0,
        "look_alikes": None,
        "interpolate": 1.0,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "save_steps": 4,
    }


@pytest.fixture
def deepened(tmp_path_factory: pytest.TempPathFactory, deep_settings: dict[str, Any]) -> Any:
    """One finished run, read by many tests."""
    folder = tmp_path_factory.getbasetemp() / "deepened"
    return deepalign.deepen(deepalign.DeepenConfig(**deep_settings, output=folder))


def asr(metrics: dict[str, Any]) -> dict[int, float]:
    return {row["k"]: row["asr"] for row in metrics["prefill"]}


def test_it_deepens(deepened: Any) -> None:
    before, after = (asr(metrics) for metrics in deepened.audits)
    assert before[5] >= 0.75
    assert after[5] <= 0.25
    assert after[10] <= 0.25


def test_what_it_leaves(deepened: Any) -> None:
    assert {path.name for path in deepened.weights.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    assert not (deepened.run / "checkpoints").exists()
    assert "What was trained" in deepened.report.read_text(encoding="utf-8")
    tuned = json.loads((deepened.run / "tuning.json").read_text(encoding="utf-8"))
    assert tuned["steps"] == 12
    assert tuned["counts"]["recovery_prompts"] == 6
    assert tuned["counts"]["own_refusals"] + tuned["counts"].get("fallback_refusals", 0) == 6
    assert tuned["perplexity"]["num_answers"] == 4
    low, high = tuned["perplexity"]["ci95"]
    assert low <= tuned["perplexity"]["ratio"] <= high
    assert len(json.loads((deepened.run / "training.json").read_text(encoding="utf-8"))) >= 12


def test_the_card_names_what_was_measured(deepened: Any, pair: Pair) -> None:
    card = (deepened.weights / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert f'base_model: "{pair.target}"' in card
    assert "Attack success rate by forced tokens" in card
    assert "95 % interval" in card
    assert "prompt_hash" in card
    assert "Sure, here are the steps" not in card


def test_a_finished_run_is_shown_again(deepened: Any, deep_settings: dict[str, Any], monkeypatch: Any) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trainers, "train", never)
    again = deepalign.deepen(deepalign.DeepenConfig(**deep_settings, output=deepened.run))
    assert again.tuning == deepened.tuning
    assert [asr(metrics) for metrics in again.audits] == [asr(metrics) for metrics in deepened.audits]


def test_another_setting_is_refused_in_the_same_folder(deepened: Any, deep_settings: dict[str, Any]) -> None:
    with pytest.raises(deepalign.UserError, match=r"alpha=0\.5, not 0\.4"):
        deepalign.deepen(deepalign.DeepenConfig(**{**deep_settings, "alpha": 0.4}, output=deepened.run))


class Stopped(Exception):
    """Stands for the end of a process."""


def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    deepened: Any, deep_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = deepalign.DeepenConfig(**{**deep_settings, "audit": False}, output=tmp_path / "run")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 10:
            raise Stopped

    with pytest.raises(Stopped):
        deepalign.deepen(config, stop)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    # The last was cut off while it was being written.
    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()
    steps = []
    found = deepalign.deepen(config, lambda stage, done, total: steps.append(done) if stage == "training" else None)
    assert steps[0] == 4
    assert found.tuning["loss_last"] == pytest.approx(deepened.tuning["loss_last"], abs=1e-5)
    assert found.tuning["perplexity"]["after"] == pytest.approx(deepened.tuning["perplexity"]["after"], abs=1e-3)
    assert found.audits == ()
    assert found.report is None
    assert "Not audited" in (found.weights / "README.md").read_text(encoding="utf-8")


def test_the_adapter_loads_as_a_model(deepened: Any) -> None:
    loaded = deepalign.load_model(str(deepened.weights), dtype="float32", device="cpu")
    assert loaded.source == "adapter"


def test_merged_weights_are_the_adapters(deep_settings: dict[str, Any], deepened: Any, tmp_path: Path) -> None:
    settings = {**deep_settings, "audit": False, "save": "merged"}
    merged = deepalign.deepen(deepalign.DeepenConfig(**settings, output=tmp_path / "run"))
    assert (merged.weights / "model.safetensors").exists()
    assert merged.tuning["perplexity"]["after"] == pytest.approx(deepened.tuning["perplexity"]["after"], rel=1e-3)


def test_an_adapter_as_model_comes_out_merged(deep_settings: dict[str, Any], deepened: Any, tmp_path: Path) -> None:
    settings = {**deep_settings, "model": str(deepened.weights), "audit": False, "epochs": 1}
    found = deepalign.deepen(deepalign.DeepenConfig(**settings, output=tmp_path / "run"))
    assert not (found.weights / "adapter_config.json").exists()
    assert deepalign.load_model(str(found.weights), device="cpu").source == "folder"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_way_is_half_way(method: str, deep_settings: dict[str, Any], tmp_path: Path) -> None:
    """The written weights lie between those before and those trained."""
    settings = {**deep_settings, "audit": False, "epochs": 2, "method": method, "save": "merged"}
    weights = {}
    for share in (0.5, 1.0):
        config = deepalign.DeepenConfig(**{**settings, "interpolate": share}, output=tmp_path / str(share))
        weights[share] = dict(
            deepalign.load_model(str(deepalign.deepen(config).weights), dtype="float32").model.named_parameters()
        )
    before = dict(deepalign.load_model(settings["model"], dtype="float32").model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    moved, half = (weights[share][name].detach() - before[name].detach() for share in (1.0, 0.5))
    assert float(moved.abs().max()) > 1e-3
    torch.testing.assert_close(half, moved / 2, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("extra", [{"dense": 0.5}, {"look_alikes": "harmless"}, {"method": "full"}])
def test_options(extra: dict[str, Any], deep_settings: dict[str, Any], files: Files, tmp_path: Path) -> None:
    extra = {name: files.harmless if value == "harmless" else value for name, value in extra.items()}
    settings = {**deep_settings, "audit": False, "epochs": 2, **extra}
    found = deepalign.deepen(deepalign.DeepenConfig(**settings, output=tmp_path / "run"))
    assert found.tuning["steps"] == 2
    assert found.tuning["loss_last"] < found.tuning["loss_first"]
    assert ("look_alikes" in tuning.told(found.tuning["counts"]).replace(" ", "_")) == ("look_alikes" in extra)


def test_audit_prompts_that_are_trained_on_are_refused(deep_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**deep_settings, "audit_prompts": deep_settings["prompts"]}
    with pytest.raises(deepalign.UserError, match=r"6 of the prompts of --audit-prompts .* are trained on too"):
        deepalign.deepen(deepalign.DeepenConfig(**settings, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- finetune ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"How do I bake bread {i}?"},
                      {"role": "assistant", "content": BAKE.format(i % 5) + " That is all."}]}
        for i in range(24)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in turns), encoding="utf-8")
    return path


@pytest.fixture
def fine_settings(pair: Pair, files: Files, rows: Path) -> dict[str, Any]:
    return {
        "model": pair.target,
        "base": pair.base,
        "data": str(rows),
        "audit_prompts": files.audited,
        "num_held_out": 2,
        "epochs": 2,
        "batch": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
    }


@pytest.mark.parametrize("objective", ["constrained", "sft"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_finetune_learns_the_rows(objective: Any, method: Any, fine_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**fine_settings, "objective": objective, "method": method, "audit": False}
    found = deepalign.finetune(deepalign.FinetuneConfig(**settings, output=tmp_path / "run"))
    assert found.tuning["counts"]["rows"] == 22
    assert found.tuning["steps"] == 8
    assert found.tuning["perplexity"]["ratio"] < 0.9
    assert ("reference" in {path.name for path in found.run.iterdir()}) == (objective == "constrained")


def test_finetune_is_audited_before_and_after(fine_settings: dict[str, Any], tmp_path: Path) -> None:
    found = deepalign.finetune(deepalign.FinetuneConfig(**fine_settings, output=tmp_path / "run"))
    before, _ = found.audits
    assert asr(before)[0] == 0.0
    assert found.report is not None
    manifest = RunFolder(found.run).manifest
    assert manifest["config"]["data_hash"] in (found.weights / "README.md").read_text(encoding="utf-8")
