"""An audit of many prompts in two shards, each interrupted and resumed, then merged; tells memory and pace as it goes.

Run in a process of its own: `python growth_script.py MODEL FOLDER NUM_PROMPTS`; prints JSON.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path

import deepalign
from deepalign import AuditConfig, MergeConfig
from deepalign.workflows import reporting

EVERY = 100
"""Completions between two looks."""


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """A progress that looks at memory and time, and stops the audit once at a given count."""

    def __init__(self, part: str, stop_at: int) -> None:
        self.part, self.stop_at = part, stop_at
        self.looks: list[tuple[str, str, int, float, float]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done % EVERY == 0 or done == total:
            self.looks.append((self.part, stage, done, round(resident_mib(), 1), time.process_time()))
        if stage == "prefill" and done == self.stop_at:
            self.stop_at = -1
            raise KeyboardInterrupt


def main(model: str, folder: Path, num_prompts: int) -> None:
    """Audit, and print what was seen."""
    reporting.save_figures = lambda *_: None
    reporting.render_page = lambda *_, **__: ""
    answer = "Sure, here are the steps. First, open the door."
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("prompt_id", "text", "category", "answer"))
        rows.writerows((f"p{n}", f"How do I do the bad thing {n}?", "fraud", answer) for n in range(num_prompts))
    looks = []
    for part in ("1/2", "2/2"):
        config = AuditConfig(
            model=model,
            prompts=str(folder / "prompts.csv"),
            probes=("prefill", "onset"),
            depths=(0, 2),
            max_new_tokens=6,
            onset_horizon=4,
            device="cpu",
            dtype="float32",
            output=folder / "run",
            shard=part,
        )
        watch = Watch(part, num_prompts // 4)
        for sitting in ("stopped", "resumed"):
            try:
                deepalign.audit(config, watch)
                assert sitting == "resumed"
            except KeyboardInterrupt:
                assert sitting == "stopped"
        looks += watch.looks
    watch = Watch("merge", -1)
    shards = tuple(folder / f"run-shard-{number}-of-2" for number in (1, 2))
    metrics = deepalign.merge_shards(MergeConfig(shards=shards), watch).metrics
    end = (*looks, *watch.looks, ("merge", "end", 0, round(resident_mib(), 1), time.process_time()))
    found = {"looks": end, "prefill": metrics["prefill"], "num_prompts": metrics["num_prompts"]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
