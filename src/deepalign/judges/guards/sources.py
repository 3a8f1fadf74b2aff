"""Which weights a guard judge reads: a pinned release by size, any hub id with its revision, or a local folder.

Owns the spec after the judge's name and the identity that goes into verdicts. A commit is known without asking the hub;
weights are fetched when the judge is made ready. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepalign.errors import UserError

_REVISION = re.compile(r"(?P<model>.+)@(?P<revision>[A-Za-z0-9._-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
_EDGE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One commit of a hub repository."""

    hub_id: str
    revision: str
    gated: bool = False
    """Whether its owner has to grant access first."""
    base: Weights | None = None
    """The model that an adapter sits on."""

    @property
    def identity(self) -> str:
        """Which weights these are."""
        return f"{self.hub_id}@{self.revision}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a judge's weights are, or come from."""

    model: Path | Weights
    base: Path | Weights | None = None
    """The model that an adapter sits on; None takes the one that the adapter names."""
    identity: str
    """Id and commit, or folder name and a hash of its content; the base's too."""
    suffix: str = ""
    """What tells this judge from the default one, for file names; "" for the default."""

    def folders(self, judge: str) -> tuple[Path, Path | None]:
        """The weights' folder and the base's, fetched where they are not there yet.

        Raises:
            UserError: They cannot be had; one line that says where to ask.
        """
        return _folder(judge, self.model), None if self.base is None else _folder(judge, self.base)


def find(judge: str, spec: str, sizes: Mapping[str, Weights], *, base: str = "") -> Source:
    """The weights that a spec names.

    Args:
        judge: Name of the judge, for messages.
        spec: A key of `sizes`, "" for the first of them, `ID_OR_FOLDER` or `ID@REVISION`.
        sizes: The pinned releases.
        base: For an adapter: id or folder of the model below it; "" for the pinned one, or what the adapter names.

    Raises:
        UserError: There is no such size or folder, or the hub does not tell which commit is meant.
    """
    default = next(iter(sizes))
    known = sizes.get(spec.lower() or default)
    if known is not None:
        suffix = "" if spec.lower() in ("", default) else spec.lower()
        return _source(judge, known, suffix, known.base, base)
    path = Path(spec).expanduser()
    if path.is_dir():
        bare = (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
        return _source(judge, path, _slug(path.name, str(path.resolve())), sizes[default].base if bare else None, base)
    if "/" not in spec:
        given = ", ".join(sizes)
        raise UserError(f"judge {judge!r} has no size or folder {spec[:200]!r}; give {given}, owner/name or a folder")
    found = _on_hub(judge, spec)
    return _source(judge, found, _slug(found.hub_id.rpartition("/")[2], spec), None, base)


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


def _source(judge: str, model: Path | Weights, suffix: str, pinned: Weights | None, given: str) -> Source:
    base: Path | Weights | None = pinned
    if given:
        path = Path(given).expanduser()
        base = path if path.is_dir() else _on_hub(judge, given)
    identity = _identity(model) if base is None else f"{_identity(model)}+{_identity(base)}"
    return Source(model=model, base=base, identity=identity, suffix=suffix)


def _on_hub(judge: str, spec: str) -> Weights:
    """A hub id; where no commit is given, the one that a branch stands at now."""
    found = _REVISION.fullmatch(spec)
    model, revision = (found["model"], found["revision"]) if found else (spec, None)
    if revision is None or not _COMMIT.fullmatch(revision):
        folder = _fetched(judge, model, revision, gated=False)
        # A snapshot's folder is named by its commit, whatever branch was asked for.
        revision = folder.name
    return Weights(hub_id=model, revision=revision)


def _folder(judge: str, place: Path | Weights) -> Path:
    return place if isinstance(place, Path) else _fetched(judge, place.hub_id, place.revision, gated=place.gated)


def _fetched(judge: str, model: str, revision: str | None, *, gated: bool) -> Path:
    from deepalign.weights import hub_folder, require_name

    try:
        require_name(model)
        return hub_folder(model, revision)
    except UserError as error:
        ask = f"ask for access at https://huggingface.co/{model} and `hf auth login`, or " if gated else ""
        reason = str(error).partition("; check the spelling")[0]
        raise UserError(f"judge {judge!r}: {reason}; {ask}give a local copy with --judge {judge}:FOLDER") from error


def _identity(place: Path | Weights) -> str:
    return f"{place.name}#{content_hash(place)}" if isinstance(place, Path) else place.identity


def _slug(name: str, spec: str) -> str:
    """For file names: two specs that end alike stay apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:40] or "model"
    return f"{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"
