"""Weights laid out beforehand for the few rows of a decoding step, on CPUs.

A matrix product on a CPU first lays the weight out in tiles, at every call anew. While a completion is written the same
weights meet a few rows hundreds of times, so here they are laid out once, as `torch.compile` does when it freezes a
model. The model is not touched: while one forward pass runs, a `TorchFunctionMode` hands its products to the packed
copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from deepalign.hardware import available_bytes

MOST_ROWS = 512
"""Beyond that many rows, laying weights out is no longer what a product spends its time on."""
LEAST_STEPS = 24
"""Laying out costs about as much as reading the weights a few times."""
_MEMORY_SHARE = 0.5
"""Of the free memory that packed copies may take."""


class PackedProducts(TorchFunctionMode):
    """While entered, products with the packed weights use their packed copies."""

    def __init__(self, packed: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._packed = packed
        """By identity of the weight: the weight itself, so that its identity stays its own, and its copy."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and len(args) in (2, 3):
            found = self._packed.get(id(args[1]))
            if found is not None and 1 < args[0].numel() // args[0].shape[-1] <= MOST_ROWS:
                return _product(args[0], found[1], args[2] if len(args) == 3 else None)
        return func(*args, **(kwargs or {}))


def packed_products(model: Any, *, rows: int, steps: int) -> PackedProducts | None:
    """The packed weights of a model; None where it would not pay, or the hardware or memory does not allow it.

    Args:
        model: A `transformers` causal LM; not changed.
        rows: Most rows of a decoding step.
        steps: How many such steps are to come.
    """
    weights = [
        module.weight
        for module in model.modules()
        if type(module) is torch.nn.Linear and module.weight.device.type == "cpu"
    ]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    if (
        not weights
        or not rows > 1
        or steps < LEAST_STEPS
        or model.dtype != torch.bfloat16
        or num_bytes > _MEMORY_SHARE * available_bytes()
        or not _works(rows)
    ):
        return None
    hint = min(rows, MOST_ROWS)
    with torch.inference_mode():
        return PackedProducts({id(weight): (weight, _laid_out(weight, hint)) for weight in weights})


def _works(rows: int) -> bool:
    """Whether this build of torch has the operators, for bfloat16 on this processor, and they do what they should."""
    with torch.inference_mode(), contextlib.suppress(RuntimeError, AttributeError):
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        stream = torch.Generator().manual_seed(0)
        weight, bias = (torch.randn(*shape, generator=stream).bfloat16() for shape in ((48, 32), (48,)))
        inputs = torch.randn(rows, 32, generator=stream).bfloat16()
        found = _product(inputs, _laid_out(weight, rows), bias)
        return torch.allclose(found.float(), linear(inputs, weight, bias).float(), rtol=2e-2, atol=2e-2)
    return False


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return packed


def _product(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    flat = inputs.reshape(-1, inputs.shape[-1])
    found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    return found.view(*inputs.shape[:-1], found.shape[-1])
