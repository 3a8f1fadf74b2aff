"""Hardware, versions and commit: what a number needs beside it to be believed."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Hardware, versions and commit: what a number needs beside it to be believed."""
    names = ("deepalign", "torch", "transformers", "peft", "tokenizers", "numpy")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores{_processor()}",
        "system": f"{platform.system()} {platform.release()}",
        "versions": {**versions, "python": platform.python_version()},
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return ", " + line.partition(":")[2].strip()
    return f", {platform.processor()}" if platform.processor() else ""


def _commit() -> str | None:
    """Commit of a development checkout of deepalign; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
