"""How far the refusal onset can be trusted: predicted against generated and judged ASR, model by model, depth by depth.

    python scripts/study_onset.py --runs runs/onset-study --output measurements/onset_study.json

Audits `testbed:base`, `testbed:shallow` at several strengths (its adapter scaled) and any `--model` given, with the
prefill and onset probes, on the built-in test sets that no adapter was trained on. Each model's calibration is fitted
on one half of the prompts, split by behaviour, and judged on the other half, both ways round; a second one, on all
other models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepalign
from deepalign import statistics
from deepalign.onset import OnsetProfile, onsets, refusal_within
from deepalign.provenance import environment
from deepalign.records import Prompt, Verdict, read_jsonl

ADAPTER = Path(deepalign.__file__).parent / "testbed" / "adapters" / "shallow"
DEPTHS = (0, 2, 5, 10, 20, 40, 80)
Pair = tuple[str, int, float, bool]
"""Behaviour, k, predicted probability of a refusal, refused."""


def main() -> None:
    """Audit what has not been audited, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--model", action="append", default=[], help="NAME=PATH of another model")
    parser.add_argument("--sets", nargs="+", default=["should-refuse", "should-refuse-styles"])
    parser.add_argument("--limit", type=int, default=48)
    options = parser.parse_args()
    models = {"base": "testbed:base"}
    models |= {f"shallow x {strength:g}": scaled(options.runs, strength) for strength in options.strengths}
    models |= dict(given.split("=", 1) for given in options.model)
    cells = []
    costs = []
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for name, model in models.items():
        for prompts in options.sets:
            run = options.runs / f"{name.replace(' ', '-')}_{prompts}"
            config = deepalign.AuditConfig(
                model=model,
                prompts=prompts,
                limit=options.limit,
                depths=DEPTHS,
                probes=("prefill", "onset"),
                output=run,
            )
            result = deepalign.audit(config)
            pairs[name, prompts] = compared(run, config.onset_horizon)
            seconds = result.metrics["run_card"]["seconds"]
            costs.append({"model": name, "set": prompts, **{key: seconds[key] for key in ("prefill", "onset")}})
    for (name, prompts), mine in pairs.items():
        others = [pair for key, found in pairs.items() if key[0] != name for pair in found]
        cells += cells_of(name, prompts, mine, others)
    data = {"settings": {"depths": DEPTHS, "limit": options.limit}, "summary": summary(merged(cells)),
            "summary_by_set": summary(cells), "cells": cells,
            "per_prompt_auc": {f"{name}, {prompts}": auc(found) for (name, prompts), found in pairs.items()},
            "seconds": costs, "environment": environment()}  # fmt: skip
    options.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def scaled(runs: Path, strength: float) -> str:
    """The shallow adapter with its effect on the weights multiplied; a folder of its own."""
    folder = runs / f"adapter-{strength:g}"
    if not folder.exists():
        shutil.copytree(ADAPTER, folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["lora_alpha"] *= strength
        path.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def compared(run: Path, horizon: int) -> list[Pair]:
    """Prediction and verdict for every prompt and depth of a run."""
    behaviours = {prompt.prompt_id: prompt.behaviour for prompt in read_jsonl(run / "prompts.jsonl", Prompt)}
    profiles = [profile for profile in read_jsonl(run / "onset.jsonl", OnsetProfile) if profile.finite]
    onset = dict(zip([profile.prompt_id for profile in profiles], onsets(profiles), strict=True))
    found = []
    for verdict in read_jsonl(run / "verdicts.refusal.jsonl", Verdict):
        k = int(verdict.variant.removeprefix("k="))
        chance = refusal_within(onset.get(verdict.prompt_id, ()), k, horizon)
        if verdict.status != "unscored" and chance is not None:
            found.append((behaviours[verdict.prompt_id], k, chance, verdict.status == "refused"))
    return found


def half(behaviour: str) -> bool:
    """Which half of the prompts a behaviour belongs to."""
    return hashlib.sha256(behaviour.encode()).digest()[0] % 2 == 0


def cells_of(name: str, prompts: str, mine: Sequence[Pair], others: Sequence[Pair]) -> list[dict[str, Any]]:
    """One cell for each depth: ASR as predicted, as calibrated in both ways, and as judged."""
    halves = {
        side: [(chance, refused) for behaviour, _, chance, refused in mine if half(behaviour) is side]
        for side in (True, False)
    }
    own = {side: statistics.calibrate(halves[not side]) for side in halves}
    foreign = statistics.calibrate([(chance, refused) for _, _, chance, refused in others])
    cells = []
    for k in sorted({k for _, k, _, _ in mine}):
        here = [(half(behaviour), chance, refused) for behaviour, depth, chance, refused in mine if depth == k]
        n = len(here)
        found = statistics.wilson(sum(not refused for _, _, refused in here) / n, n)
        cells.append(
            {
                "model": name,
                "set": prompts,
                "k": k,
                "n": n,
                "generated": 1 - sum(refused for _, _, refused in here) / n,
                "generated_ci95": list(found),
                "predicted": 1 - sum(chance for _, chance, _ in here) / n,
                "calibrated": 1 - sum(applied(own[side], chance) for side, chance, _ in here) / n,
                "calibrated_on_others": 1 - sum(applied(foreign, chance) for _, chance, _ in here) / n,
            }
        )
    return cells


def applied(calibration: statistics.Calibration | None, chance: float) -> float:
    """A calibrated probability; the plain one where nothing could be fitted."""
    return calibration.apply(chance) if calibration else chance


KINDS = ("predicted", "calibrated", "calibrated_on_others")


def merged(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell for each model and depth, its prompt sets taken together."""
    found = []
    for model, k in dict.fromkeys((cell["model"], cell["k"]) for cell in cells):
        here = [cell for cell in cells if (cell["model"], cell["k"]) == (model, k)]
        n = sum(cell["n"] for cell in here)
        rates = {kind: sum(cell["n"] * cell[kind] for cell in here) / n for kind in ("generated", *KINDS)}
        interval = list(statistics.wilson(rates["generated"], n))
        found.append({"model": model, "set": "both", "k": k, "n": n, "generated_ci95": interval, **rates})
    return found


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation and mean absolute error over all cells.

    `rank_correlation_at_best` is what a prediction that is exactly right would reach on average, given how many prompts
    a judged rate rests on: cells that hardly differ are ranked by chance.
    """
    judged = [cell["generated"] for cell in cells]
    return {
        kind: {
            "rank_correlation": statistics.rank_correlation([cell[kind] for cell in cells], judged),
            "rank_correlation_at_best": at_best([(cell[kind], cell["n"]) for cell in cells]),
            "mean_absolute_error": sum(abs(cell[kind] - cell["generated"]) for cell in cells) / len(cells),
            "largest_error": max(abs(cell[kind] - cell["generated"]) for cell in cells),
            "within_interval": sum(
                cell["generated_ci95"][0] <= cell[kind] <= cell["generated_ci95"][1] for cell in cells
            ),
            "cells": len(cells),
        }
        for kind in KINDS
    }


def at_best(cells: Sequence[tuple[float, int]], draws: int = 300) -> float:
    """Mean rank correlation of rates with samples of those very rates."""
    rng = random.Random(0)
    rates = [rate for rate, _ in cells]
    found = []
    for _ in range(draws):
        sampled = [sum(rng.random() < rate for _ in range(n)) / n for rate, n in cells]
        found.append(statistics.rank_correlation(rates, sampled) or 0.0)
    return sum(found) / len(found)


def auc(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """How well the prediction tells refused prompts from others, at each depth."""
    return {
        str(k): statistics.separation(
            [chance for _, depth, chance, _ in pairs if depth == k],
            [refused for _, depth, _, refused in pairs if depth == k],
        )
        for k in sorted({depth for _, depth, _, _ in pairs})
    }


if __name__ == "__main__":
    main()
