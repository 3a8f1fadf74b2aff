"""The run folder: plain files that survive any interruption, and tell how they came to be.

A folder belongs to one resolved configuration. Record files are append-only, one whole line at a time, and keyed; a
line that a killed process left half written is cut off on opening. Everything else is written beside its place and
renamed. One process at a time may write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from deepalign.errors import BusyError, UserError
from deepalign.provenance import environment
from deepalign.records import read_jsonl, to_json

MANIFEST = "manifest.json"
_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EPERM, errno.ENAMETOOLONG,
)  # fmt: skip
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run leaves behind."""

    run: Path
    """The run folder."""
    metrics: dict[str, Any]
    """The content of its `metrics.json`."""

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.run / "report.html"


def named_folder(model: str, settings: Mapping[str, Any], kind: str = "") -> Path:
    """A run folder named by model and settings, so that the same command finds it again."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name if "/" in model else model).strip("-.")
    return Path("runs") / "-".join(part for part in (name[:60] or "model", kind, digest) if part)


class RunFolder:
    """A run's folder, opened for reading; `writing()` takes the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest; raises `UserError` where the folder is not a run."""
        try:
            data = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            what = "holds no manifest.json" if self.path.is_dir() else "does not exist"
            raise UserError(f"{self.path} is not a run folder: it {what}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / MANIFEST} cannot be read: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise UserError(f"{self.path / MANIFEST} is not the manifest of a run; choose another folder")
        return data

    def records(self, name: str, record_type: type[Record]) -> list[Record]:
        """All whole records of a file; none where there is no file.

        Raises:
            UserError: A line is malformed.
        """
        return list(self.stream(name, record_type))

    def stream(self, name: str, record_type: type[Record]) -> Iterator[Record]:
        """The same, one after the other: for files that outgrow memory."""
        path = self.path / name
        if not path.exists():
            return
        try:
            yield from read_jsonl(path, record_type)
        except (ValueError, OSError) as error:
            raise UserError(f"{error}; delete that line, or the file, and run the same command again") from error

    def write_records(self, name: str, records: Iterable[Any]) -> None:
        """Write a whole record file in one step."""
        write_atomically(self.path / name, (to_json(record) + "\n" for record in records))

    @contextlib.contextmanager
    def writing(self, *, wait: float = 0.0) -> Iterator[None]:
        """Make the folder and hold it alone; disk errors come out as one clear line.

        Args:
            wait: Seconds to wait for another process that holds it.

        Raises:
            BusyError: Another process holds it for longer.
            UserError: The disk is full, or the folder cannot be written.
        """
        with clear_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(self.path / ".lock").acquire(timeout=wait)
            except Timeout:
                raise BusyError(f"{self.path} is being written by another process; wait for it, or stop it") from None
            with lock:
                yield

    def claim(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Bind the folder to a configuration, or check that it is bound to this one.

        Args:
            config: Everything that decides the run's results; JSON values only.
            facts: What else to note when the run begins.

        Returns:
            The manifest.

        Raises:
            UserError: The folder belongs to another configuration, or holds files that are not a run's.
        """
        if (self.path / MANIFEST).exists():
            known = self.manifest
            _same_config(self.path, known["config"], json.loads(json.dumps(config)))
            return known
        # A process killed in its first write leaves its half of a manifest, under the name that it writes beside.
        own = (".lock", f".{MANIFEST}.")
        strangers = sorted(path.name for path in self.path.iterdir() if not path.name.startswith(own))
        if strangers:
            raise UserError(f"{self.path} is not a run folder and not empty ({strangers[0]}); choose another --output")
        manifest = {"schema_version": 1, "config": dict(config), **facts, "environment": environment()}
        self.write_json(MANIFEST, manifest)
        return self.manifest

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest; nested objects are merged one level deep."""
        manifest = self.manifest
        for name, value in facts.items():
            old = manifest.get(name)
            manifest[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.write_json(MANIFEST, manifest)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file in one step."""
        self.write_text(name, json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in one step."""
        write_atomically(self.path / name, text)

    def appender(self, name: str) -> Appender:
        """Open a record file for appending; use as a context manager."""
        return Appender(self.path / name)


class Appender:
    """Appends whole JSON lines to a file; an unfinished last line is cut off first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> Appender:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        os.ftruncate(self._descriptor, _whole_lines(self._descriptor, size))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, records: Iterable[Any]) -> None:
        """Write records; on a full disk whatever part got written is taken back."""
        data = "".join(to_json(record) + "\n" for record in records).encode()
        start = os.lseek(self._descriptor, 0, os.SEEK_END)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise


def _whole_lines(descriptor: int, size: int) -> int:
    """Length of a file without an unfinished last line."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        newline = os.read(descriptor, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def write_atomically(path: Path, text: str | bytes | Iterable[str]) -> None:
    """Write a file, or the lines of one, beside its place and rename it, so that nobody sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if isinstance(text, str | bytes):
            beside.write_bytes(text.encode() if isinstance(text, str) else text)
        else:
            with beside.open("w", encoding="utf-8", newline="") as lines:
                lines.writelines(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into one clear line."""
    try:
        yield
    except Exception as error:
        code = _system_code(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free space and run the same command again; what was finished is kept"
            raise UserError(f"the disk is full while writing {path}: {remedy}") from error
        if code in _UNWRITABLE:
            raise UserError(f"{path} cannot be written ({os.strerror(code)}); choose another --output") from error
        raise


def _system_code(error: Exception) -> int:
    """The system's number of an error, which safetensors tells in words; 0 for none."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(told[1]) if told else 0


def _same_config(path: Path, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    # What the user gave is told before a hash that follows from it.
    for field in sorted(set(known) | set(asked), key=lambda name: (_is_hash(asked.get(name)), name)):
        if known.get(field) != asked.get(field):
            raise UserError(
                f"{path} holds a run with {field}={known.get(field)!r}, not {asked.get(field)!r}; "
                "give the same settings to resume it, or another --output"
            )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None
