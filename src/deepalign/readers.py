"""A model as text is put into ids for it, without its weights: tokenizer, template, and how it ends and samples.

What an engine outside this process leaves to be done here. Names are those of `models.load_model`.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deepalign import testbed
from deepalign.chat import NO_TEMPLATE_REMEDY, ChatTemplate, resolve_template
from deepalign.errors import UserError, first_line
from deepalign.weights import gguf_tokenizer, local_path, read_tokenizer, require_name

_WANTED = ["*.json", "*.jinja", "*.model", "*.txt"]


class Reads(Protocol):
    """What a loaded model and a reader have in common."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Of `transformers`."""
        ...

    @property
    def template(self) -> ChatTemplate:
        """The chat template in use."""
        ...

    @property
    def generation_config(self) -> Any:
        """The model's own generation settings; None where it states none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A model without its weights."""

    name: str
    tokenizer: Any
    template: ChatTemplate
    generation_config: Any
    source: str
    """Where it was read from: "hub", "folder", "adapter", "gguf", "testbed"."""
    revision: str | None
    architecture: str
    """The class that its configuration names; "" where it names none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    tokenizer: Any
    folder: Path | None
    """Where `config.json` and `generation_config.json` lie."""
    source: str


def load_reader(
    name: str, *, revision: str | None = None, chat_template: str | None = None, adapter_base: str | None = None
) -> Reader:
    """Tokenizer, template and generation settings of a name; no weights are read, nor fetched from the hub.

    Args:
        name: "testbed:base" and its kin, a hub id, a local folder (model or PEFT adapter) or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        chat_template: A Jinja file, or "plain"; default the tokenizer's own.
        adapter_base: The model that an adapter sits on, where its own record is wrong or missing.

    Raises:
        UserError: The name, revision or template cannot be used; one line with the remedy.
    """
    files = _read(name, revision, adapter_base)
    template = resolve_template(files.tokenizer, chat_template, name)
    if template is None:
        raise UserError(f"{name} has no chat template; {NO_TEMPLATE_REMEDY}")
    config = _json(files.folder, "config.json")
    return Reader(
        name=name,
        tokenizer=files.tokenizer,
        template=template,
        generation_config=_generation_config(files.folder, config),
        source=files.source,
        revision=revision,
        architecture=str(next(iter(config.get("architectures") or []), "")),
    )


def _read(name: str, revision: str | None, adapter_base: str | None) -> _Files:
    require_name(name)
    if name.startswith("testbed:"):
        found = _from_folder(name, testbed.folder(name), adapter_base)
        return _Files(tokenizer=found.tokenizer, folder=found.folder, source="testbed")
    path = local_path(name)
    if path is not None and path.is_file():
        return _from_gguf(name, path)
    if path is not None:
        return _from_folder(name, path, adapter_base)
    found = _from_folder(name, _fetched(name, revision), adapter_base)
    return _Files(tokenizer=found.tokenizer, folder=found.folder, source="hub")


def _from_folder(name: str, folder: Path, adapter_base: str | None) -> _Files:
    if (folder / "adapter_config.json").is_file():
        settings = _json(folder, "adapter_config.json")
        base_name = adapter_base or settings.get("base_model_name_or_path")
        if not base_name:
            raise UserError(f"{name} does not say which model it was trained on; pass it with --adapter-base")
        base = _read(base_name, settings.get("revision"), None)
        own = (folder / "tokenizer_config.json").is_file()
        tokenizer = read_tokenizer(name, folder) if own else base.tokenizer
        return _Files(tokenizer=tokenizer, folder=base.folder, source="adapter")
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return _Files(tokenizer=read_tokenizer(name, folder), folder=folder, source="folder")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _from_gguf(name, ggufs[0])
    raise UserError(f"{name} is a folder without tokenizer_config.json, adapter_config.json or a single .gguf file")


def _from_gguf(name: str, path: Path) -> _Files:
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{name} is a file but not a .gguf; give the folder that holds the model's config.json")
    return _Files(tokenizer=gguf_tokenizer(name, path), folder=None, source="gguf")


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except Exception as error:
        # The hub client raises many kinds (HTTP, gating, missing revision, offline); all mean it cannot be had.
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at}: no such folder, and the hub did not give it ({first_line(error)}); MODEL must name where "
            "the tokenizer and chat template of the served model are"
        ) from error


def _generation_config(folder: Path | None, config: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    stated = _json(folder, "generation_config.json")
    if not stated:
        # As `transformers` does with a model that brings no such file.
        stated = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    return GenerationConfig.from_dict(stated)


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None:
        return {}
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    return {}
