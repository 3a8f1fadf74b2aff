"""Install deepalign for development into the running virtual environment, quietly; used by the Makefile.

    .venv/bin/python scripts/setup_environment.py LOG

Versions are those of `constraints.txt`. PyTorch comes first and alone: a later step that meets an open range would
otherwise take the newest build, which on Linux brings gigabytes of CUDA libraries. What pip says goes to LOG; on
failure its last lines are shown.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Install; the exit status of the step that failed, or 0."""
    log = Path(sys.argv[1])
    steps = (
        [pinned("torch")],
        ["--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[dev]"],
        # For the chat templates that it ships, which tests read as files; it is never run.
        ["--no-deps", pinned("axolotl")],
    )
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    with log.open("w", encoding="utf-8") as out:
        for step in steps:
            done = subprocess.run([*pip, *step], stdout=out, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                out.flush()
                tail = log.read_text(encoding="utf-8").splitlines()[-8:]
                print("\n".join(tail), f"\ninstalling {' '.join(step)} failed; the whole output is in {log}")
                return done.returncode
    return 0


def pinned(package: str) -> str:
    """The requirement of a package in the constraints."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


if __name__ == "__main__":
    sys.exit(main())
