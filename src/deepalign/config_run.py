"""Settings that commands share: model, judge, and what the work runs on; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from deepalign.errors import UserError


def _whole(_: type, tokens: Sequence[Any]) -> int:
    """Read a whole number; 1.5 is refused, where a lenient reader would round it."""
    token = tokens[0]
    try:
        return int(token.value)
    except ValueError:
        raise UserError(f'{token.keyword} "{token.value}" is not a whole number') from None


Whole = Annotated[int, Parameter(converter=_whole)]


def at_least(option: str, value: int, least: int) -> None:
    """Refuse a value of an option that is under the least that it can be."""
    if value < least:
        raise UserError(f"--{option} {value} is too small; give at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """A model, who judges it, and what the work runs on."""

    model: str = field(kw_only=False)
    """Model to audit: hub id, local folder, PEFT adapter folder, GGUF file, or a testbed name."""

    judge: str = "refusal"
    """Judge: a built-in name, rubric:MODEL@URL, module:Name, or scripted:FILE; several with commas make a panel."""

    show_completions: bool = False
    """Show completions and prompts' answers in the report instead of redacting them."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights while generating; auto is bfloat16 where the hardware is fast at it."""

    kl_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights while measuring KL; auto is float32 up to 4 billion parameters."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps; sharded spreads a large model over all GPUs, then the CPU."""

    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits to which weights are rounded while loading, model and base alike; needs bitsandbytes."""

    max_batch: Whole | None = None
    """Most sequences at a time, default 160 on a CPU and 640 on a GPU; less is taken where memory asks for it."""

    skip_swap_check: bool = False
    """Go on even if base and model look exchanged."""
