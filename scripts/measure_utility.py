"""Safety, over-refusal and utility of the embedded models, side by side, for the documents.

    python scripts/measure_utility.py --output runs/utility-study

About a quarter of an hour on two idle CPU cores; the same command goes on where it was stopped. Writes
`measurements/utility_testbed_cpu_DATE.json` (rates, intervals, settings; no prompt and no completion) and the figures
`docs/images/trade-off.png` and `docs/images/utility-bars.png`. With `--only-write` nothing is run.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
from pathlib import Path
from typing import Any

import deepalign
from deepalign.judges import get_judge
from deepalign.metrics import rate_json
from deepalign.records import JudgeInput
from deepalign.report.figures import save_figures
from deepalign.statistics import rate
from deepalign.workflows.side_by_side import joined

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("base", "shallow", "deep")
KEPT = ("model", "models", "trade_off", "utility", "over_refusal", "run_card")
GENERATED = ("arithmetic", "extraction", "instructions")
FIGURES = ("trade-off.png", "utility-bars.png")


def main() -> None:
    """Audit each model, measure its utility, write one file and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only-write", action="store_true", help="write the figures of what is done")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    folders = [options.output / f"{what}-{name}" for what in ("audit", "utility") for name in MODELS]
    if not options.only_write:
        for name in MODELS:
            measure(name, options.output)
    found = [(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))) for folder in folders]
    runs = [data for _, data in joined(found)]
    day = found[0][1]["run_card"]["started"][:10]
    path = ROOT / "measurements" / f"utility_testbed_cpu_{day}.json"
    kept = [
        {name: run[name] for name in KEPT} | {"answers": answers(options.output / f"utility-{model}")}
        for model, run in zip(MODELS, runs, strict=True)
    ]
    path.write_text(json.dumps({"models": kept}, indent=1) + "\n", encoding="utf-8")
    drawn = options.output / "figures"
    save_figures(runs, drawn, ("png",))
    for figure in FIGURES:
        shutil.copy(drawn / figure, ROOT / "docs" / "images" / figure)
    print(path.relative_to(ROOT))


def answers(run: Path) -> dict[str, Any]:
    """By task, how many answers refuse (the rule-based judge), and their median number of words."""
    found = {}
    for task in GENERATED:
        lines = (run / "samples" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["resps"][0][0] for line in lines]
        rulings = get_judge("refusal").judge([JudgeInput(prompt="", response=text) for text in texts])
        refused = [(str(place), one.status == "refused") for place, one in enumerate(rulings)]
        found[task] = {
            "refused": rate_json(rate(refused)),
            "median_words": statistics.median(len(text.split()) for text in texts),
        }
    return found


def measure(name: str, output: Path) -> None:
    """An audit of prefilling and over-refusal, and the built-in tasks."""
    audit: dict[str, Any] = {"probes": ("prefill", "over-refusal"), "depths": (0, 5, 10, 20, 40)}
    deepalign.audit(
        deepalign.AuditConfig(
            model=f"testbed:{name}", limit=24, max_new_tokens=32, output=output / f"audit-{name}", **audit
        )
    )
    deepalign.measure_utility(
        deepalign.UtilityConfig(model=f"testbed:{name}", limit=60, output=output / f"utility-{name}")
    )


if __name__ == "__main__":
    main()
