"""Names to loaded models: hub ids, local folders, PEFT adapters, GGUF files and the embedded testbed.

Owns what a loaded model is, its template and its fingerprint. Where weights come from is in `weights.py`, which device
and dtype in `hardware.py`. Knows nothing of prompts or attacks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deepalign.chat import NO_TEMPLATE_REMEDY, ChatTemplate, resolve_template
from deepalign.errors import UserError
from deepalign.hardware import pick_device, pick_dtype
from deepalign.heads import vocabulary_size
from deepalign.weights import Layout, Quantize, load_parts

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_SAMPLES_PER_TENSOR = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready to be measured, with all that identifies it."""

    name: str
    model: Any
    """A `transformers` causal LM in evaluation mode."""
    tokenizer: Any
    template: ChatTemplate
    fingerprint: str
    """16 hex digits from names, shapes and a strided sample of every weight; the same for the same weights."""
    source: str
    """Where the weights came from: "hub", "folder", "adapter", "gguf", "testbed"."""
    revision: str | None = None

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype, such as "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def generation_config(self) -> Any:
        """The model's own generation settings."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return torch.device(self.model.device)

    @property
    def vocab_size(self) -> int:
        """Width of the model's output, in tokens."""
        return vocabulary_size(self.model)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return int(self.model.num_parameters())

    @property
    def quantization(self) -> str | None:
        """Method by which the weights hold fewer bits than their dtype, such as "bitsandbytes 4bit"; None for none."""
        if not getattr(self.model, "is_quantized", False):
            return None
        config = self.model.config.quantization_config
        settings = config if isinstance(config, dict) else config.to_dict()
        bits = next((f" {bits}bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
        return f"{getattr(settings['quant_method'], 'value', settings['quant_method'])}{bits}"

    @property
    def architecture(self) -> str:
        """Class name of the model."""
        return type(self.model).__name__


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    quantize: Quantize = "none",
    chat_template: str | None = None,
    adapter_base: str | None = None,
    fallback_template: ChatTemplate | None = None,
) -> LoadedModel:
    """Load any Hugging Face causal LM by name.

    Args:
        name: "testbed:base" and its kin, a hub id, a local folder (model or PEFT adapter) or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" takes bfloat16 where the hardware is fast at it, else float32.
        device: "auto", or any torch device such as "cpu", "cuda:1", "mps"; "sharded" spreads the layers over all there
            are, and over the CPU's memory where those do not hold them.
        quantize: "8bit" or "4bit" (NF4) while loading, by bitsandbytes; not needed where few bits were saved.
        chat_template: A Jinja file, or "plain"; default the tokenizer's own.
        adapter_base: The model that an adapter sits on, where its own record is wrong or missing.
        fallback_template: Used when the tokenizer has none (a base model read through its aligned twin's template).

    Raises:
        UserError: The name, revision, dtype, device or template cannot be used; one line with the remedy.
    """
    torch_device = pick_device("auto" if device == "sharded" else device)
    layout = Layout(
        dtype=pick_dtype(dtype, torch_device), device=None if device == "sharded" else torch_device, quantize=quantize
    )
    parts = load_parts(name, revision, layout, adapter_base)
    try:
        if getattr(parts.model, "hf_device_map", None) is None:
            parts.model.to(torch_device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name} does not fit on {torch_device}; use --device sharded, --device cpu or --quantize 4bit"
        ) from error
    return from_objects(
        parts.model.eval(),
        parts.tokenizer,
        name=name,
        source=parts.source,
        revision=revision,
        chat_template=chat_template,
        fallback_template=fallback_template,
    )


def from_objects(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    source: str = "object",
    revision: str | None = None,
    chat_template: str | None = None,
    fallback_template: ChatTemplate | None = None,
) -> LoadedModel:
    """Wrap a model and tokenizer that the caller already holds; neither is changed.

    Raises:
        UserError: There is no chat template, or the tokenizer knows ids that the model has no row for.
    """
    template = resolve_template(tokenizer, chat_template, name) or fallback_template
    if template is None:
        raise UserError(f"{name} has no chat template; {NO_TEMPLATE_REMEDY}")
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > num_rows:
        raise UserError(
            f"{name}: the tokenizer knows {len(tokenizer)} tokens but the model has {num_rows} embedding rows; "
            "the two do not belong together"
        )
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        template=template,
        fingerprint=fingerprint(model),
        source=source,
        revision=revision,
    )


def fingerprint(model: Any) -> str:
    """16 hex digits over names, shapes and up to 1024 strided values of each weight (read as float32)."""
    digest = hashlib.sha256()
    for weight_name, weight in sorted(model.state_dict().items()):
        digest.update(f"{weight_name}{tuple(weight.shape)}".encode())
        digest.update(_sample(model, weight_name, weight).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(model: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.is_meta:
        from accelerate.utils import align_module_device

        # Kept off the devices between passes (`device_map`): fetched for as long as it is looked at.
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        with align_module_device(module, "cpu"):
            return _strided(getattr(module, leaf))
    return _strided(weight)


def _strided(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    return flat[::stride].to(device="cpu", dtype=torch.float32).contiguous()
