"""Copy the figures of a training run to `measurements/`, for the documents.

    deepalign deepen testbed:shallow --output runs/deep
    python scripts/document_tuning.py runs/deep deepen_testbed-shallow
    python scripts/document_audit.py

Keeps rates, intervals, KL, perplexity, counts, settings and environment; no prompt and no completion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("model", "num_prompts", "judge", "prefill", "depth", "over_refusal", "kl", "run_card")


def main() -> None:
    """Write one file of figures."""
    run, name = Path(sys.argv[1]), sys.argv[2]
    manifest = read(run / "manifest.json")
    found = {
        "command": manifest["command"],
        "settings": manifest["config"],
        "environment": manifest["environment"],
        "tuning": read(run / "tuning.json"),
        **{when: audit(run / f"audit-{when}" / "metrics.json") for when in ("before", "after")},
    }
    day = manifest["environment"]["started"][:10]
    path = ROOT / "measurements" / f"{name}_cpu_{day}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def audit(path: Path) -> dict[str, Any] | None:
    """What is kept of an audit; None where there was none."""
    if not path.exists():
        return None
    metrics = read(path)
    return {section: metrics.get(section) for section in KEPT}


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
