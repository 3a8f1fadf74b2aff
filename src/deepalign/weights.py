"""Where weights and tokenizers are read from: folders, PEFT adapters, GGUF files, the hub and the testbed.

Reads safetensors (or GGUF) only, and never runs a model's own code. What a name means is decided here; what is done
with the loaded parts is not.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaTokenizer,
)

from deepalign import testbed
from deepalign.errors import UserError, first_line

Quantize = Literal["none", "8bit", "4bit"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What each kind of source yields before template and fingerprint."""

    model: Any
    tokenizer: Any
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How weights are to lie in memory."""

    dtype: torch.dtype
    device: torch.device | None
    """None spreads the layers over all devices there are."""
    quantize: Quantize = "none"

    def arguments(self, *, quantized: bool) -> dict[str, Any]:
        """Of `from_pretrained`; `quantized` says that the files themselves hold fewer bits.

        Weights of few bits cannot be moved later, so they go where they belong at once; others are moved by the caller.
        """
        if self.device is None:
            placed: dict[str, Any] = {"device_map": "auto"}
        elif quantized or self.quantize != "none":
            placed = {"device_map": {"": str(self.device)}}
        else:
            placed = {}
        if self.quantize == "8bit":
            placed["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif self.quantize == "4bit":
            placed["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype
            )
        return {"dtype": self.dtype, **placed}


def load_parts(name: str, revision: str | None, layout: Layout, adapter_base: str | None) -> Parts:
    """Model and tokenizer of a name; raises `UserError` with the remedy where they cannot be had.

    The model is where the layout says if `hf_device_map` is set on it, else on the CPU.
    """
    require_name(name)
    if name.startswith("testbed:"):
        folder = testbed.folder(name)
        parts = _load_folder(name, folder, layout, adapter_base)
        return Parts(model=parts.model, tokenizer=parts.tokenizer, source="testbed")
    path = local_path(name)
    if path is not None and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{name} is a file but not a .gguf; give the folder that holds the model's config.json")
        return _load_gguf(name, path.parent, path.name, layout)
    if path is not None and path.is_dir():
        return _load_folder(name, path, layout, adapter_base)
    return _load_hub(name, revision, layout, adapter_base)


def require_name(name: str) -> None:
    """Raise `UserError` where a name is neither a testbed model, a file or folder, nor a possible hub id."""
    if name.startswith("testbed:"):
        testbed.require(name)
    elif local_path(name) is None and (name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name)):
        raise UserError(f"no model at {name[:200]}: no such folder, and not a hub id (owner/name) or testbed name")


def local_path(name: str) -> Path | None:
    """The file or folder of that name; None for text that the system cannot take for a path, or that is not there."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _load_folder(name: str, folder: Path, layout: Layout, adapter_base: str | None) -> Parts:
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(name, folder, layout, adapter_base)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{name} holds no .safetensors file; pickled weights are not read: convert them with save_pretrained"
            )
        return Parts(model=_weights(name, folder, layout), tokenizer=read_tokenizer(name, folder), source="folder")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _load_gguf(name, folder, ggufs[0].name, layout)
    raise UserError(f"{name} is a folder without config.json, adapter_config.json or a single .gguf file")


def _load_adapter(name: str, folder: Path, layout: Layout, adapter_base: str | None) -> Parts:
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
        base = load_parts(base_name, settings.get("revision"), layout, None)
    except UserError as error:
        raise UserError(f"the base of the adapter {name}: {error}; or pass another with --adapter-base") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(name, folder) if has_tokenizer else base.tokenizer
    if len(tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        # The new rows are drawn at random; the seed makes an adapter that brings none of its own load the same twice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base.model.resize_token_embeddings(len(tokenizer))
    try:
        adapted = PeftModel.from_pretrained(base.model, str(folder))
        _require_mergeable(adapted, folder / "adapter_model.safetensors")
        # Merged into weights of few bits it would be rounded away; there it stays beside them.
        few_bits = getattr(base.model, "is_quantized", False)
        merged = adapted.get_base_model() if few_bits else adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{name} does not fit its base {base_name}: {first_line(error)}; check --adapter-base"
        ) from error
    return Parts(model=merged, tokenizer=tokenizer, source="adapter")


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


def _load_gguf(name: str, folder: Path, filename: str, layout: Layout) -> Parts:
    if layout.quantize != "none" or layout.device is None:
        raise UserError(
            f"{name} is a GGUF file, read whole and in 16 or 32 bits: leave out --quantize, and name one --device"
        )
    tokenizer = gguf_tokenizer(name, folder / filename)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=filename, dtype=layout.dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise UserError(f"{name} is a GGUF file: install its reader with pip install gguf") from error
    except Exception as error:
        raise UserError(f"{name} cannot be read as GGUF: {first_line(error)}") from error
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > num_rows:
        tokenizer = _without_strangers(tokenizer, num_rows)
    return Parts(model=model, tokenizer=tokenizer, source="gguf")


def gguf_tokenizer(name: str, path: Path) -> Any:
    """The tokenizer inside a GGUF file; raises `UserError` where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"{name} is a GGUF file: install its reader with pip install gguf") from error
    except Exception as error:
        raise UserError(f"{name} cannot be read as GGUF: {first_line(error)}") from error


def _without_strangers(tokenizer: Any, num_rows: int) -> Any:
    """A tokenizer without the tokens that `transformers` adds to one read from GGUF and the model has no row for.

    It adds GPT-2's <|endoftext|> to any byte-level vocabulary, Llama 3's too, which has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        data = _read_json(file)
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < num_rows]
        file.write_text(json.dumps(data), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def hub_folder(name: str, revision: str | None) -> Path:
    """The folder with a hub model's weights and tokenizer, fetched where it is not there yet; never its code."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The hub client raises many kinds (HTTP, gating, missing revision, offline); all mean it cannot be had.
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at}: no such folder, and the hub did not give it ({first_line(error)}); check the spelling, your "
            "network, or log in with `hf auth login` if it is gated"
        ) from error


def _load_hub(name: str, revision: str | None, layout: Layout, adapter_base: str | None) -> Parts:
    parts = _load_folder(name, hub_folder(name, revision), layout, adapter_base)
    return Parts(model=parts.model, tokenizer=parts.tokenizer, source="hub")


def _weights(name: str, folder: Path, layout: Layout) -> Any:
    try:
        # Left unset, `trust_remote_code` means to ask on the terminal.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = _auto_class(config).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **layout.arguments(quantized=getattr(config, "quantization_config", None) is not None),
        )
    except ImportError as error:
        raise UserError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, SafetensorError and more on a broken folder.
        raise UserError(f"{name} cannot be loaded as a causal LM: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise UserError(f"{name} is not whole: {len(missing)} weights are missing, such as {missing[0]}; save it again")
    return model


def _auto_class(config: Any) -> Any:
    """A causal LM's own class where there is one, else the wrapper that holds one beside encoders of images."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not known else AutoModelForCausalLM


def read_tokenizer(name: str, folder: Path) -> Any:
    """A folder's tokenizer; raises `UserError` where it has none that can be used."""
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    try:
        return _sentencepiece(folder) if bare else AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        install = "pip install 'deepalign[sentencepiece]'"
        raise UserError(f"{name} has a SentencePiece model for a tokenizer: install its readers, {install}") from error
    except Exception as error:
        raise UserError(f"{name} has no usable tokenizer: {first_line(error)}") from error


def _sentencepiece(folder: Path) -> Any:
    """Of the class that it names: for a Mistral, `AutoTokenizer` loses the space before the first word."""
    # Without both, transformers takes the file for another format.
    import sentencepiece  # noqa: F401

    settings = folder / "tokenizer_config.json"
    own = settings.is_file() and str(_read_json(settings).get("tokenizer_class")).startswith("LlamaTokenizer")
    return (LlamaTokenizer if own else AutoTokenizer).from_pretrained(folder, trust_remote_code=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return data
