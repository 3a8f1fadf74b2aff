"""Fixtures: rows of random ids, and short trainings of random models on the CPU; nothing is fetched."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from deepalign.training.arguments import ConstrainedSFTConfig
from deepalign.training.trainer import ConstrainedSFTTrainer

TRAINER_ARGUMENTS = (
    "peft_config",
    "reference_model",
    "eval_dataset",
    "callbacks",
    "compute_loss_func",
    "data_collator",
    "compute_metrics",
    "formatting_func",
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True, scope="package")
def _fast_collection() -> Iterator[None]:
    """Each training collects garbage; what was loaded before need not be looked at each time."""
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    datasets.enable_progress_bars()


@dataclass
class Run:
    """A trainer after training, and what there is to compare."""

    trainer: Any

    def logged(self, name: str) -> list[float]:
        """A figure of each step that was logged."""
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]

    @property
    def losses(self) -> list[float]:
        return self.logged("loss")

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.trainer.model.named_parameters() if weight.requires_grad}

    def distance(self, other: Run) -> float:
        """Largest difference of any trained weight."""
        assert self.weights.keys() == other.weights.keys()
        return max(float((weight - other.weights[name]).abs().max()) for name, weight in self.weights.items())


@pytest.fixture
def make_rows() -> Callable[..., list[dict[str, list[int]]]]:
    """Rows of random ids, prompts and answers of unequal lengths: `make_rows(8, seed=0)`."""

    def make(
        count: int, seed: int = 0, *, prompt: tuple[int, int] = (2, 6), answer: tuple[int, int] = (2, 16)
    ) -> list[dict[str, list[int]]]:
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            num_prompt, num_answer = draw.randint(*prompt), draw.randint(*answer)
            ids = draw.choices(range(4, 300), k=num_prompt + num_answer)
            rows.append({"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]})
        return rows

    return make


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Three steps of SGD without warm-up, whose result is linear in the gradients."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    }


@pytest.fixture
def make_trainer(tiny_llama: Any, tiny_tokenizer: Any, settings: dict[str, Any]) -> Callable[..., Any]:
    """A trainer of a random model: `make_trainer(rows, model=..., peft_config=..., any_setting=...)`.

    With `cls` and `config`, another trainer of the same settings.
    """

    def make(
        rows: Any,
        *,
        model: Any = None,
        cls: Any = ConstrainedSFTTrainer,
        config: Any = ConstrainedSFTConfig,
        **changes: Any,
    ) -> Any:
        others = {name: changes.pop(name) for name in TRAINER_ARGUMENTS if name in changes}
        if isinstance(others.get("eval_dataset"), list):
            others["eval_dataset"] = datasets.Dataset.from_list(others["eval_dataset"])
        return cls(
            tiny_llama() if model is None else model,
            config(**{**settings, **changes}),
            train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=tiny_tokenizer,
            **others,
        )

    return make


@pytest.fixture
def train(make_trainer: Any) -> Callable[..., Run]:
    """The same, trained."""

    def run(rows: Any, *, resume: str | None = None, **changes: Any) -> Run:
        trainer = make_trainer(rows, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return Run(trainer)

    return run


@pytest.fixture
def lora() -> Callable[..., LoraConfig]:
    """Settings of a small adapter."""

    def make(**changes: Any) -> LoraConfig:
        chosen = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
        return LoraConfig(task_type="CAUSAL_LM", **chosen)

    return make


@pytest.fixture
def moved() -> Callable[..., Any]:
    """A model with every weight a little elsewhere."""

    def move(model: Any, by: float = 0.02, seed: int = 5) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += by * torch.randn(weight.shape, generator=generator)
        return model

    return move
