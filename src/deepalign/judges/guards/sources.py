"""Which weights a guard judge reads: a pinned release by size, any hub id with its revision, or a local folder.

Owns the spec after the judge's name and the identity that goes into verdicts. Loads nothing; imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepalign.errors import UserError

_REVISION = re.compile(r"(?P<model>.+)@(?P<revision>[A-Za-z0-9._-]+)")
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
_EDGE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One published release."""

    hub_id: str
    revision: str
    gated: bool = False
    """Whether its owner has to grant access first."""
    base: Weights | None = None
    """The model that an adapter sits on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights that are there."""

    folder: Path
    base: Path | None
    """Folder of the model that an adapter sits on; None takes the one that the adapter names."""
    identity: str
    """Id and commit, or folder name and a hash of its content."""
    suffix: str
    """What tells this judge from the default one, for file names; "" for the default."""


def find(judge: str, spec: str, sizes: Mapping[str, Weights], *, base: str = "") -> Source:
    """The weights that a spec names, fetched from the hub where they are not there yet.

    Args:
        judge: Name of the judge, for messages.
        spec: A key of `sizes`, "" for the first of them, `ID_OR_FOLDER` or `ID@REVISION`.
        sizes: The pinned releases.
        base: For an adapter: id or folder of the model below it; "" for the pinned one, or what the adapter names.

    Raises:
        UserError: They cannot be had; one line that says where to ask.
    """
    default = next(iter(sizes))
    known = sizes.get(spec.lower() or default)
    if known is not None:
        folder = _release(judge, known)
        suffix = "" if spec.lower() in ("", default) else spec.lower()
        return _with_base(judge, folder, _identity(known.hub_id, folder), suffix, known.base, base)
    path = Path(spec).expanduser()
    if path.is_dir():
        identity = f"{path.name}#{content_hash(path)}"
        return _with_base(judge, path, identity, _slug(path.name, str(path.resolve())), _assumed(sizes, path), base)
    found = _REVISION.fullmatch(spec)
    model, revision = (found["model"], found["revision"]) if found else (spec, None)
    if "/" not in model:
        known_sizes = ", ".join(sizes)
        raise UserError(
            f"judge {judge!r} has no size or folder {spec[:200]!r}; give {known_sizes}, owner/name or a folder"
        )
    folder = _fetched(judge, model, revision, gated=False)
    return _with_base(judge, folder, _identity(model, folder), _slug(model.rpartition("/")[2], spec), None, base)


def content_hash(folder: Path) -> str:
    """12 hex digits over names, sizes, heads and tails of the files that loading reads."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in _READ and file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            digest.update(content.read(_EDGE_BYTES))
            content.seek(max(0, size - _EDGE_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:12]


def _with_base(judge: str, folder: Path, identity: str, suffix: str, pinned: Weights | None, given: str) -> Source:
    if not given and pinned is None:
        return Source(folder=folder, base=None, identity=identity, suffix=suffix)
    if given and Path(given).expanduser().is_dir():
        base = Path(given).expanduser()
        below = f"{base.name}#{content_hash(base)}"
    elif given:
        found = _REVISION.fullmatch(given)
        model, revision = (found["model"], found["revision"]) if found else (given, None)
        base = _fetched(judge, model, revision, gated=False)
        below = _identity(model, base)
    else:
        assert pinned is not None
        base = _release(judge, pinned)
        below = _identity(pinned.hub_id, base)
    return Source(folder=folder, base=base, identity=f"{identity}+{below}", suffix=suffix)


def _assumed(sizes: Mapping[str, Weights], folder: Path) -> Weights | None:
    """The pinned base of an adapter that someone has in a folder; None for whole models."""
    pinned = next(iter(sizes.values())).base
    return pinned if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file() else None


def _release(judge: str, release: Weights) -> Path:
    return _fetched(judge, release.hub_id, release.revision, gated=release.gated)


def _fetched(judge: str, model: str, revision: str | None, *, gated: bool) -> Path:
    from deepalign.weights import hub_folder, require_name

    try:
        require_name(model)
        return hub_folder(model, revision)
    except UserError as error:
        ask = f"ask for access at https://huggingface.co/{model} and `hf auth login`, or " if gated else ""
        reason = str(error).partition("; check the spelling")[0]
        raise UserError(f"judge {judge!r}: {reason}; {ask}give a local copy with --judge {judge}:FOLDER") from error


def _identity(model: str, folder: Path) -> str:
    """A snapshot's folder is named by its commit, whatever branch was asked for."""
    commit = folder.name if folder.parent.name == "snapshots" else content_hash(folder)
    return f"{model}@{commit}"


def _slug(name: str, spec: str) -> str:
    """For file names: two specs that end alike stay apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:40] or "model"
    return f"{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"
