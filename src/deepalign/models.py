"""Names to loaded models: hub ids, local folders, PEFT adapters, GGUF files and the embedded testbed.

Owns name resolution, dtype and device choice, and fingerprints. Never runs a model's own code
(`trust_remote_code` stays off) and reads safetensors only (or GGUF). Knows nothing of prompts or attacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deepalign import testbed
from deepalign.chat import NO_TEMPLATE_REMEDY, ChatTemplate, resolve_template
from deepalign.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
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
    def device(self) -> torch.device:
        """Where input ids go."""
        return torch.device(self.model.device)

    @property
    def vocab_size(self) -> int:
        """Width of the model's output, in tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return int(self.model.num_parameters())

    @property
    def architecture(self) -> str:
        """Class name of the model."""
        return type(self.model).__name__


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What each kind of source yields before template and fingerprint."""

    model: Any
    tokenizer: Any
    source: str


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    chat_template: str | None = None,
    adapter_base: str | None = None,
    fallback_template: ChatTemplate | None = None,
) -> LoadedModel:
    """Load any Hugging Face causal LM by name.

    Args:
        name: "testbed:base" and its kin, a hub id, a local folder (model or PEFT adapter) or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" takes bfloat16 where the hardware is fast at it, else float32.
        device: "auto", or any torch device such as "cpu", "cuda:1", "mps".
        chat_template: A Jinja file, or "plain"; default the tokenizer's own.
        adapter_base: The model that an adapter sits on, where its own record is wrong or missing.
        fallback_template: Used when the tokenizer has none (a base model read through its aligned twin's template).

    Raises:
        UserError: The name, revision, dtype, device or template cannot be used; one line with the remedy.
    """
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    parts = _load_parts(name, revision, torch_dtype, adapter_base)
    try:
        parts.model.to(torch_device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name} does not fit on {torch_device}; use --device cpu or --dtype bfloat16") from error
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
        flat = weight.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        sample = flat[::stride].to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{weight_name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_parts(name: str, revision: str | None, dtype: torch.dtype, adapter_base: str | None) -> _Parts:
    if name.startswith("testbed:"):
        folder = testbed.folder(name)
        parts = _load_folder(name, folder, dtype, adapter_base)
        return _Parts(model=parts.model, tokenizer=parts.tokenizer, source="testbed")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{name} is a file but not a .gguf; give the folder that holds the model's config.json")
        return _load_gguf(name, path.parent, path.name, dtype)
    if path.is_dir():
        return _load_folder(name, path, dtype, adapter_base)
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise UserError(f"no model at {name}: no such folder, and not a hub id (owner/name) or testbed name")
    return _load_hub(name, revision, dtype, adapter_base)


def _load_folder(name: str, folder: Path, dtype: torch.dtype, adapter_base: str | None) -> _Parts:
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(name, folder, dtype, adapter_base)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{name} holds no .safetensors file; pickled weights are not read: convert them with save_pretrained"
            )
        return _Parts(model=_weights(name, folder, dtype), tokenizer=_tokenizer(name, folder), source="folder")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _load_gguf(name, folder, ggufs[0].name, dtype)
    raise UserError(f"{name} is a folder without config.json, adapter_config.json or a single .gguf file")


def _load_adapter(name: str, folder: Path, dtype: torch.dtype, adapter_base: str | None) -> _Parts:
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{name} has adapter_config.json but no adapter_model.safetensors; save the adapter again")
    settings = _read_json(folder / "adapter_config.json")
    base_name = adapter_base or settings.get("base_model_name_or_path")
    if not base_name:
        raise UserError(f"{name} does not say which model it was trained on; pass it with --adapter-base")
    if Path(base_name).expanduser().resolve() == folder.resolve():
        raise UserError(f"{name} names itself as the model it was trained on; pass that model with --adapter-base")
    try:
        base = _load_parts(base_name, settings.get("revision"), dtype, None)
    except UserError as error:
        raise UserError(f"the base of the adapter {name}: {error}; or pass another with --adapter-base") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = _tokenizer(name, folder) if has_tokenizer else base.tokenizer
    if len(tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        # The new rows are drawn at random; the seed makes an adapter that brings none of its own load the same twice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base.model.resize_token_embeddings(len(tokenizer))
    try:
        adapted = PeftModel.from_pretrained(base.model, str(folder))
        _require_mergeable(adapted, folder / "adapter_model.safetensors")
        merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{name} does not fit its base {base_name}: {_reason(error)}; check --adapter-base") from error
    return _Parts(model=merged, tokenizer=tokenizer, source="adapter")


def _require_mergeable(adapted: Any, file: Path) -> None:
    """Refuse virtual tokens, and an adapter made for another model; PEFT would go on with what happens to fit."""
    from peft import get_peft_model_state_dict

    if adapted.active_peft_config.is_prompt_learning:
        raise ValueError("it adds virtual tokens to the input, which cannot be merged into weights")
    with safe_open(file, framework="pt") as weights:
        saved = set(weights.keys())
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # An adapter may also carry whole weights of its base, such as the embeddings of tokens that it added.
    odd = sorted((needed - saved) | (saved - needed - set(adapted.state_dict())))
    if odd:
        raise ValueError(f"{len(odd)} weights are on one side only, such as {odd[0]}")


def _load_gguf(name: str, folder: Path, filename: str, dtype: torch.dtype) -> _Parts:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=filename)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=filename, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise UserError(f"{name} is a GGUF file: install its reader with pip install gguf") from error
    except Exception as error:
        raise UserError(f"{name} cannot be read as GGUF: {_reason(error)}") from error
    return _Parts(model=model, tokenizer=tokenizer, source="gguf")


def _load_hub(name: str, revision: str | None, dtype: torch.dtype, adapter_base: str | None) -> _Parts:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The hub client raises many kinds (HTTP, gating, missing revision, offline); all mean it cannot be had.
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at}: no such folder, and the hub did not give it ({_reason(error)}); check the spelling, your "
            "network, or log in with `hf auth login` if it is gated"
        ) from error
    parts = _load_folder(name, folder, dtype, adapter_base)
    return _Parts(model=parts.model, tokenizer=parts.tokenizer, source="hub")


def _weights(name: str, folder: Path, dtype: torch.dtype) -> Any:
    try:
        # Left unset, `trust_remote_code` means to ask on the terminal.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, SafetensorError and more on a broken folder.
        raise UserError(f"{name} cannot be loaded as a causal LM: {_reason(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise UserError(f"{name} is not whole: {len(missing)} weights are missing, such as {missing[0]}; save it again")
    return model


def _tokenizer(name: str, folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{name} has no usable tokenizer: {_reason(error)}") from error


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {_reason(error)}; try --device cpu") from error
    return chosen


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise UserError(f"--dtype {dtype} is not one of auto, {', '.join(known)}")
    return known[dtype]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; decided by its features, never by timing."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return data


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a model writes."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
