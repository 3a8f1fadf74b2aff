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
    torch = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    steps = ([torch], ["--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[dev]"])
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


if __name__ == "__main__":
    sys.exit(main())
