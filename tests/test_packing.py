"""Packed weights: the products of the plain ones, and when they are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from deepalign import packing
from deepalign.generation import generate
from deepalign.packing import MOST_ROWS, PackedProducts, packed_products
from test_graphs import jobs

needs_operators = pytest.mark.skipif(not packing._works(8), reason="this build or processor lacks the operators")


@pytest.fixture
def bfloat16_model(random_model: Callable[..., Any]) -> Any:
    return random_model("qwen2").to(torch.bfloat16)  # a family with biases


@needs_operators
@pytest.mark.parametrize("rows", [2, 7, 64, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_the_plain_ones(rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16() if biased else None
    inputs = torch.randn(rows, 1, 64).bfloat16()
    with torch.inference_mode():
        products = PackedProducts({id(weight): (weight, packing._laid_out(weight, rows))})
        with products:
            found = linear(inputs, weight, bias)
            other = linear(inputs, weight.clone(), bias)
    exact = linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == (rows, 1, 96)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, other, rtol=1e-2, atol=1e-2)


@needs_operators
def test_only_few_rows_use_the_packed_copy() -> None:
    """One row alone and large batches are left to the library: the copy here is of other weights, so it would show."""
    weight = torch.ones(16, 8).bfloat16()
    with torch.inference_mode(), PackedProducts({id(weight): (weight, packing._laid_out(weight * 3, 8))}):
        sums = {rows: linear(torch.ones(rows, 8).bfloat16(), weight)[0, 0].item() for rows in (1, 2, MOST_ROWS, 513)}
    assert sums == {1: 8.0, 2: 24.0, MOST_ROWS: 24.0, 513: 8.0}


@needs_operators
def test_generation_uses_them_and_writes_the_same(bfloat16_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = jobs(40, 0.0)
    calls = []
    product = packing._product

    def counted(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(inputs.shape[0])
        return product(inputs, packed, bias)

    before = {name: value.clone() for name, value in bfloat16_model.state_dict().items()}
    monkeypatch.setattr(packing, "_product", counted)
    found = sorted(generate(bfloat16_model, asked, stop_ids=()), key=lambda one: one.index)
    assert len(calls) > 30
    monkeypatch.setattr(packing, "_works", lambda rows: False)
    expected = sorted(generate(bfloat16_model, asked, stop_ids=()), key=lambda one: one.index)
    # In bfloat16 another order of sums may turn a near tie.
    same = sum(one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True))
    assert same >= len(asked) - 2
    assert all(torch.equal(value, before[name]) for name, value in bfloat16_model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "rows", "steps"),
    [({}, 1, 100), ({}, 8, 3), ({"dtype": torch.float32}, 8, 100), ({"memory": 0}, 8, 100), ({"works": False}, 8, 100)],
)
def test_where_it_does_not_pay_nothing_is_packed(
    bfloat16_model: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], rows: int, steps: int
) -> None:
    if "memory" in change:
        monkeypatch.setattr(packing, "available_bytes", lambda: change["memory"])
    if "works" in change:
        monkeypatch.setattr(packing, "_works", lambda rows: False)
    model = bfloat16_model.to(change.get("dtype", torch.bfloat16))
    assert packed_products(model, rows=rows, steps=steps) is None
