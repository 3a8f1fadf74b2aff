"""What several test modules need that is no fixture."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from deepalign.chat import Rendered


def conversation(num_prompt: int, num_answer: int, seed: int, vocab_size: int = 97) -> Rendered:
    """Random ids, as a prompt and its answer."""
    ids = random.Random(seed).choices(range(3, vocab_size), k=num_prompt + num_answer)
    return Rendered(ids=tuple(ids), response_mask=(False,) * num_prompt + (True,) * num_answer)


def run_out_of_memory(model: Any, when: Callable[[torch.Tensor], bool]) -> None:
    """Make a model's body fail on every pass whose input ids fulfil a condition."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if when(kwargs["input_ids"]):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(before, with_kwargs=True)
