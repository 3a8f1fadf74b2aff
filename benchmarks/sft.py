"""An optimizer step of `ConstrainedSFTTrainer` against one of TRL's `SFTTrainer`.

Sides: TRL's plain fine-tuning; ours with the reference read beforehand, with the reference read at each step, and with
the plain objective, so that only the output layer differs. Reading the reference beforehand is not timed: it is one
forward pass over the data, once. All sides log what TRL logs (entropy, accuracy), ours the constraint's figures too.
`--prompts` has no part in it. `benchmarks/training.py` says what a step is.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.compare import Comparison, compare_sides
from benchmarks.training import Steps, Work, with_losses
from deepalign.models import load_model
from deepalign.training.arguments import ConstrainedSFTConfig
from deepalign.training.trainer import ConstrainedSFTTrainer

LORA_RANK = 16
OURS: dict[str, dict[str, Any]] = {
    "precomputed": {"reference": "precomputed"},
    "online": {"reference": "online"},
    "sft": {"objective": "sft", "head": "one-pass"},
}


def compare(*, repeats: int, num_prompts: int, lora: bool = False) -> Comparison:
    """Time all sides on the testbed's base model, with all weights or an adapter trained."""
    loaded = load_model("testbed:base", dtype="float32")
    work = Work.on(loaded.device)
    data = work.data(loaded.tokenizer, repeats + 1)
    with tempfile.TemporaryDirectory() as folder:
        common = work.arguments(loaded.device, repeats + 1, Path(folder))

        def begin(trainer: type[SFTTrainer], args: SFTConfig) -> Steps:
            # Dropout would make the sides differ.
            adapter = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, task_type="CAUSAL_LM")
            return Steps(
                trainer(
                    copy.deepcopy(loaded.model),
                    args,
                    train_dataset=data,
                    processing_class=loaded.tokenizer,
                    peft_config=adapter if lora else None,
                )
            )

        sides = {"trl": begin(SFTTrainer, SFTConfig(**common, max_length=work.tokens))}
        for name, own in OURS.items():
            args = ConstrainedSFTConfig(**common, max_length=work.tokens, **own)
            sides[name] = begin(ConstrainedSFTTrainer, args)
        found = compare_sides(
            "sft_lora" if lora else "sft_full",
            sides,
            against="trl",
            repeats=repeats,
            device=loaded.device,
            settings={**work.settings(loaded.device), "trained": f"LoRA r={LORA_RANK}" if lora else "all weights"},
        )
    return with_losses(found, sides, against="trl")
