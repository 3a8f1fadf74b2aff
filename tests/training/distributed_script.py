"""Short trainings over a global batch of four rows, by however many processes there are; run by `torchrun`, too."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign.training.arguments import ConstrainedSFTConfig
from deepalign.training.trainer import ConstrainedSFTTrainer

SCENARIOS: dict[str, dict[str, Any]] = {
    "online": {"reference": "online"},
    "precomputed": {"reference": "precomputed"},
    "trl": {"reference": "precomputed", "head": "trl"},
    "accumulated": {"reference": "precomputed", "gradient_accumulation_steps": 2},
    "sequence_mean": {"reference": "online", "reduction": "sequence_mean"},
    "sequence_sum": {"reference": "precomputed", "reduction": "sequence_sum", "learning_rate": 0.02},
    "groups": {"reference": "online", "group_weights": [0.3, 2.0]},
    "lora online": {"reference": "online", "lora": True, "learning_rate": 0.5},
    "lora precomputed": {"reference": "precomputed", "lora": True, "learning_rate": 0.5},
    "other": {"reference": "online", "other": True},
}
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.2,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "gradient_checkpointing": False,
}


def train(name: str, folder: Path, out: Path) -> None:
    """Trains the model in a folder on its rows; writes what was logged, and the trained weights."""
    changes = dict(SCENARIOS[name])
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    others = {"peft_config": lora} if changes.pop("lora", False) else {}
    if changes.pop("other", False):
        others["reference_model"] = AutoModelForCausalLM.from_pretrained(folder / "other")
    backend = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
    args = ConstrainedSFTConfig(output_dir=str(out / name), **{**SETTINGS, **backend, **changes})
    size = 4 // args.world_size // args.gradient_accumulation_steps
    args.per_device_train_batch_size = args.per_device_eval_batch_size = size
    trainer = ConstrainedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args,
        train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text(encoding="utf-8"))),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        **others,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {
            key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad
        }
        save_file(weights, out / f"{name}.safetensors")
        log = {"world_size": args.world_size, "logs": trainer.state.log_history}
        (out / f"{name}.json").write_text(json.dumps(log), encoding="utf-8")


if __name__ == "__main__":
    disable_progress_bars()
    gc.freeze()
    for scenario in SCENARIOS:
        train(scenario, Path(sys.argv[1]), Path(sys.argv[2]))
