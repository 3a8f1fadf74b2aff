"""A constrained step against the algorithm of the paper's own code, both with the reference read beforehand.

Theirs is written here from a description of that code, on current `transformers`: logits for all positions, a
log-softmax over the whole vocabulary, a loop over the samples that collects their response tokens, detached weights
clamped at 1e-3, and one mean over the micro-batch. Same optimizer, clipping and data; all weights, float32. It logs
neither entropy nor accuracy, which ours does. `--prompts` has no part in it.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from benchmarks.compare import Comparison
from benchmarks.compare import compare as run_comparison
from benchmarks.training import Steps, Work, with_losses
from deepalign.models import load_model
from deepalign.training.arguments import ConstrainedSFTConfig
from deepalign.training.trainer import ConstrainedSFTTrainer

_IGNORED = -100
_WEIGHT_FLOOR = 1e-3


def compare(*, repeats: int, num_prompts: int) -> Comparison:
    """Time both on the testbed's base model."""
    loaded = load_model("testbed:base", dtype="float32")
    work = replace(Work.on(loaded.device), bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        common = work.arguments(loaded.device, repeats + 1, Path(folder))
        ours = ConstrainedSFTTrainer(
            copy.deepcopy(loaded.model),
            ConstrainedSFTConfig(**common, max_length=work.tokens, reference="precomputed", weight_floor=_WEIGHT_FLOOR),
            train_dataset=work.data(loaded.tokenizer, repeats + 1),
            processing_class=loaded.tokenizer,
        )
        theirs = OfficialAlgorithm(
            copy.deepcopy(loaded.model),
            TrainingArguments(**common, remove_unused_columns=False),
            data_collator=stack,
            train_dataset=ours.train_dataset,
        )
        sides = {"ours": Steps(ours), "theirs": Steps(theirs)}
        found = run_comparison(
            "official_loss",
            sides["ours"],
            sides["theirs"],
            repeats=repeats,
            device=loaded.device,
            settings={**work.settings(loaded.device), "trained": "all weights", "weight_floor": _WEIGHT_FLOOR},
        )
    return with_losses(found, sides, against="theirs")


class OfficialAlgorithm(Trainer):
    """The loss of the paper's code, on a plain trainer."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Weighted cross-entropy, its mean over all response tokens of the micro-batch."""
        labels_BT = inputs["labels"][:, 1:]
        reference_BT = inputs["reference_log_probs"][:, 1:]
        logits_BTV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        all_BTV = logits_BTV.log_softmax(dim=-1)
        logps_BT = all_BTV.gather(2, labels_BT.clamp(min=0).unsqueeze(2)).squeeze(2)
        losses = []
        for row in range(len(labels_BT)):
            inside_T = labels_BT[row] != _IGNORED
            logps_N, reference_N = logps_BT[row][inside_T], reference_BT[row][inside_T]
            beta_N = torch.full_like(logps_N, 0.1)
            beta_N[:5] = 2.0
            beta_N[:1] = 0.5
            weight_N = 2.0 * (1.0 - torch.sigmoid(beta_N * (logps_N - reference_N)))
            losses.append(-logps_N * weight_N.detach().clamp(min=_WEIGHT_FLOOR))
        return torch.cat(losses).mean()


def stack(examples: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """Rows of one length, as a batch."""
    batch = {
        name: torch.tensor([row[name] for row in examples]) for name in ("input_ids", "labels", "reference_log_probs")
    }
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
