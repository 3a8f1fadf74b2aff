"""Take the refusal direction out of both embedded models, under several limits on what else may change.

    python scripts/measure_ablation.py --output runs/ablation

For each model and limit on the KL divergence on harmless prompts: the direction that is chosen, what it leaves of the
refusals, what it costs harmless prompts, and the attack success rate. A few minutes on two CPU cores; stopped, it goes
on. Writes `measurements/ablation_testbed_cpu_DATE.json`, without prompts, completions or directions.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import deepalign
from deepalign.runs import environment

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("testbed:shallow", "testbed:deep")
LIMITS = (0.1, 0.5, 2.0, 0.0)
"""Nats; 0 is no limit."""
PROMPTS = 24


def main() -> None:
    """Audit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for limit in LIMITS:
            config = deepalign.AuditConfig(
                model=model,
                limit=PROMPTS,
                probes=("abliteration",),
                depths=(0,),
                ablation_kl=limit,
                output=options.output / f"{model.replace(':', '-')}-{limit:g}",
            )
            section = deepalign.audit(config).metrics["abliteration"]
            rows.append({"model": model, "limit": limit or None, **section})
            print(model, limit or "no limit", {name: section[name] for name in ("refusal_after", "kl", "ablated")})
    day = datetime.date.today().isoformat()
    path = ROOT / "measurements" / f"ablation_testbed_cpu_{day}.json"
    found = {"name": "ablation", "prompts": PROMPTS, "rows": rows, "environment": environment()}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
