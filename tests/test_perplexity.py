"""Perplexity of given answers, against full logits, and its change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support import run_out_of_memory

from deepalign.chat import Rendered
from deepalign.perplexity import AnswerLoss, answer_losses, perplexity_change


def items() -> list[Rendered]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, spans in ((12, [(5, 12)]), (7, [(2, 3), (5, 7)]), (9, [(1, 9)])):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        found.append(
            Rendered(ids=tuple(ids), response_mask=tuple(any(a <= i < b for a, b in spans) for i in range(length)))
        )
    return found  # fmt: skip


def by_hand(model: Any, item: Rendered) -> float:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(dim=-1)
    return -sum(float(logps[i - 1, item.ids[i]]) for i, mine in enumerate(item.response_mask) if mine)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_it_is_the_cross_entropy_of_the_response(
    architecture: str, batch: int, random_model: Callable[..., Any]
) -> None:
    model = random_model(architecture)
    found = list(answer_losses(model, items(), batch=batch))
    assert [one.num_tokens for one in found] == [7, 3, 8]
    assert [one.nats for one in found] == pytest.approx([by_hand(model, item) for item in items()], rel=1e-5)


def test_no_answers(random_model: Callable[..., Any]) -> None:
    assert list(answer_losses(random_model("llama"), [])) == []


def test_what_memory_does_not_hold_is_unscored(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    whole = list(answer_losses(model, items()))
    run_out_of_memory(model, lambda ids: len(ids) > 1 or ids.shape[1] == 7)
    found = list(answer_losses(model, items()))
    assert [math.isnan(one.nats) for one in found] == [False, True, False]
    assert [found[0].nats, found[2].nats] == pytest.approx([whole[0].nats, whole[2].nats], rel=1e-5)
    assert perplexity_change(found[1:2], whole[1:2]) is None


def test_change_by_hand() -> None:
    before = [AnswerLoss(nats=10.0, num_tokens=10), AnswerLoss(nats=30.0, num_tokens=10)]
    after = [AnswerLoss(nats=12.0, num_tokens=10), AnswerLoss(nats=36.0, num_tokens=10)]
    found = perplexity_change(before, after)
    assert found is not None
    assert (found.before, found.after) == pytest.approx((math.exp(2.0), math.exp(2.4)))
    assert found.ratio == pytest.approx(math.exp(0.4))
    assert found.ci95 == pytest.approx((math.exp(0.2), math.exp(0.6)))
    assert (found.num_answers, found.num_tokens, found.num_unscored) == (2, 20, 0)


def test_an_unscored_answer_counts_on_neither_side() -> None:
    lost = AnswerLoss(nats=float("nan"), num_tokens=10)
    known = AnswerLoss(nats=10.0, num_tokens=10)
    found = perplexity_change([known, known], [known, lost])
    assert found is not None
    assert (found.ratio, found.num_answers, found.num_unscored, found.ci95) == (1.0, 1, 1, None)
