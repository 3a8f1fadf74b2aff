"""Per-position KL: slices of the vocabulary against two full-logit passes with `log_softmax`, both in float32."""

from __future__ import annotations

import torch

from benchmarks.compare import Comparison
from benchmarks.compare import compare as run_comparison
from deepalign.chat import Rendered, answer_ids, conversation, render
from deepalign.depth import check_vocabularies, kl_profiles
from deepalign.models import LoadedModel, load_model
from deepalign.prompts import builtin_prompts

POSITIONS = 128
BATCH = 8


def compare(*, repeats: int, num_prompts: int) -> Comparison:
    """Time both on the testbed's shallow model and its base."""
    model, base = load_model("testbed:shallow", dtype="float32"), load_model("testbed:base", dtype="float32")
    items = []
    for prompt in builtin_prompts("should-refuse")[:num_prompts]:
        ids = answer_ids(model.tokenizer, prompt.answer or "")[:POSITIONS]
        items.append((prompt.prompt_id, render(model.tokenizer, model.template, conversation(prompt.text, None), ids)))
    vocab = check_vocabularies(model, base)
    return run_comparison(
        "kl",
        lambda: list(
            kl_profiles(model.model, base.model, items, vocab_size=vocab, max_positions=POSITIONS, batch=BATCH)
        ),
        lambda: full_logits(model, base, items),
        repeats=repeats,
        device=model.device,
        settings={"prompts": num_prompts, "positions": POSITIONS, "dtype": "float32", "batch": BATCH},
    )


@torch.inference_mode()
def full_logits(model: LoadedModel, base: LoadedModel, items: list[tuple[str, Rendered]]) -> list[torch.Tensor]:
    """KL from two [B, T, V] log-softmaxes, in both directions, right-padded batches."""
    found = []
    for start in range(0, len(items), BATCH):
        part = [rendered for _, rendered in items[start : start + BATCH]]
        width = max(len(rendered.ids) for rendered in part)
        rows = [list(rendered.ids) + [0] * (width - len(rendered.ids)) for rendered in part]
        mask = [[1] * len(rendered.ids) + [0] * (width - len(rendered.ids)) for rendered in part]
        inputs = {
            "input_ids": torch.tensor(rows, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
        }
        log_p = model.model(**inputs, use_cache=False).logits.float().log_softmax(dim=-1)
        log_q = base.model(**inputs, use_cache=False).logits.float().log_softmax(dim=-1)
        forward = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        reverse = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
        for row, rendered in enumerate(part):
            found += [forward[row, rendered.response_start - 1 :], reverse[row, rendered.response_start - 1 :]]
    return found
