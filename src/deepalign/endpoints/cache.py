"""Replies kept on disk by the content of their request, so that nothing is paid for twice.

Owns the key and the file. The key does not depend on the server, the file holds no request: only its hash and the
reply. Several processes may use one file. Whatever happens to the file costs a line in the log, never a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.endpoints.exchange import Request

logger = logging.getLogger(__name__)
_WAIT_SECONDS = 30.0
_PER_QUERY = 500
_TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, stored INTEGER NOT NULL)"
_DAMAGED = ("not a database", "malformed", "disk image", "no such column", "no such table", "file is encrypted")


def default_path() -> Path:
    """Beside the testbed in the hub client's assets cache, so that HF_HOME moves it too."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path(library_name="deepalign", namespace="judges")) / "replies.sqlite"


def key_of(request: Request) -> str:
    """SHA-256 of what is asked: path, model, messages, sampling."""
    content = json.dumps([request.path, request.body], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


class ReplyCache:
    """A table from key to reply; without a path it remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._off = path is None

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The replies that are there."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(keys), _PER_QUERY):
            part = keys[start : start + _PER_QUERY]
            marks = ",".join("?" * len(part))
            for key, text in self._run(f"SELECT key, reply FROM replies WHERE key IN ({marks})", part):
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    reply = json.loads(text)
                    if isinstance(reply, dict):
                        found[key] = reply
        return found

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Keep a reply; on disk when this returns."""
        values = (key, json.dumps(reply, ensure_ascii=True), int(time.time()))
        self._run("INSERT OR REPLACE INTO replies (key, reply, stored) VALUES (?, ?, ?)", values)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._drop()

    def _run(self, statement: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            for last in (False, True):
                if self._off:
                    return []
                try:
                    with self._open() as connection:
                        return connection.execute(statement, tuple(values)).fetchall()
                except (sqlite3.Error, OSError) as error:
                    self._drop()
                    if last or not self._set_aside(error):
                        logger.warning("the cache of replies %s is not used: %s", self.path, error)
                        self._off = True
            return []

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            assert self.path is not None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                # What judges say of harmful answers is nobody else's business.
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False)
            self._connection.execute(_TABLE)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _set_aside(self, error: Exception) -> bool:
        """Move a damaged file away; False where that is not what is wrong."""
        if self.path is None or not any(sign in str(error) for sign in _DAMAGED):
            return False
        beside = self.path.with_name(f"{self.path.name}.damaged-{int(time.time())}")
        with contextlib.suppress(OSError):
            os.replace(self.path, beside)
        logger.warning(
            "the cache of replies %s was damaged; it is now %s, and a new one begins", self.path, beside.name
        )
        return True
