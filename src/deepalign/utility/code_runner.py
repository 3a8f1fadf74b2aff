"""Code that a model wrote, run against its tests in a process of its own with limits.

The process has no environment, no site packages, an empty folder, little memory, a few seconds, no files to write, no
further processes, and no network where the kernel lets it give that up. These are limits, not a jail: it can still read
what its user can read, so whoever runs code of strangers does it in a container as well.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from deepalign.errors import UserError

_LIMITS = """import ctypes, resource
for _what, _most in (("CPU", {seconds}), ("AS", {memory}), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0), ("NOFILE", 32)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + _what), (_most, _most))
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user and a network of its own
except (AttributeError, OSError):
    pass
del ctypes, resource
"""
_MEMORY_BYTES = 1 << 30


def run_code(program: str, *, seconds: int = 10) -> str:
    """Run a program to its end: "" where it gets there, else the reason why it does not.

    Raises:
        UserError: This system cannot limit a process.
    """
    if sys.platform == "win32":
        raise UserError("code cannot be limited on Windows; run code tasks on Linux or macOS")
    # Printed after the last line: a program that leaves early has not passed.
    token = secrets.token_hex(16)
    limits = _LIMITS.format(seconds=seconds, memory=_MEMORY_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(f"{limits}\n{program}\n\nprint({token!r})\n", encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", str(file)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds + 5,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {seconds} seconds"
    if done.stdout.rstrip().endswith(token.encode()):
        return ""
    told = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return told[-1][:200] if told else f"left early with status {done.returncode}"
