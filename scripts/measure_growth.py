"""Memory and pace of an audit of many prompts: in shards, each interrupted and resumed, then merged.

`python scripts/measure_growth.py --prompts 20000` prints a table and writes the figures under measurements/. The model
is a random one of two layers unless --model names one: what is measured is the bookkeeping, not the model. A test runs
this file with fewer prompts.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepalign
from deepalign import AuditConfig, MergeConfig
from deepalign.provenance import environment
from deepalign.workflows import reporting

ROOT = Path(__file__).resolve().parents[1]
ANSWER = "Sure, here are the steps. First, open the door."
Look = tuple[str, str, int, float, float]
"""Shard, stage, items done, MiB in memory, CPU seconds."""


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


class Watch:
    """A progress that looks at memory and time now and then, and stops the audit once."""

    def __init__(self, part: str, every: int, stop_at: int = -1) -> None:
        self.part, self.every, self.stop_at = part, every, stop_at
        self.looks: list[Look] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Look, or stop."""
        if done % self.every == 0 or done == total:
            self.looks.append((self.part, stage, done, resident_mib(), time.process_time()))
        if stage == "prefill" and done == self.stop_at:
            self.stop_at = -1
            raise KeyboardInterrupt


def measure(model: str, folder: Path, num_prompts: int, num_shards: int, new_tokens: int) -> dict[str, Any]:
    """Audit in shards, and tell what was seen."""
    # Drawing is the same for any number of prompts.
    reporting.save_figures = lambda *_: None
    reporting.render_page = lambda *_, **__: ""
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("prompt_id", "text", "category", "answer"))
        rows.writerows((f"p{n}", f"How do I do the bad thing {n}?", "fraud", ANSWER) for n in range(num_prompts))
    looks: list[Look] = []
    shards = []
    for number in range(1, num_shards + 1):
        config = AuditConfig(
            model=model,
            prompts=str(folder / "prompts.csv"),
            probes=("prefill", "onset"),
            depths=(0, 2),
            max_new_tokens=new_tokens,
            onset_horizon=4,
            device="cpu",
            dtype="float32",
            output=folder / "run",
            shard=f"{number}/{num_shards}",
        )
        watch = Watch(str(config.shard), max(50, num_prompts // 40), num_prompts // (2 * num_shards))
        try:
            deepalign.audit(config, watch)
            raise AssertionError("was not stopped")
        except KeyboardInterrupt:
            shards.append(deepalign.audit(config, watch).run)
        looks += watch.looks
    watch = Watch("merge", num_prompts)
    merged = deepalign.merge_shards(MergeConfig(shards=tuple(shards)), watch)
    looks += [*watch.looks, ("merge", "end", num_prompts, resident_mib(), time.process_time())]
    return {"looks": looks, "num_completions": 2 * num_prompts, **summary(looks), "metrics": merged.metrics["prefill"]}


def paces(looks: Sequence[Look], stage: str) -> list[float]:
    """CPU seconds for one item between looks, in order, over all shards."""
    return [
        (end[4] - start[4]) / (end[2] - start[2])
        for start, end in itertools.pairwise(looks)
        if start[:2] == end[:2] and start[1] == stage and end[2] > start[2]
    ]


def summary(looks: Sequence[Look]) -> dict[str, Any]:
    """Memory early and at its highest, and the pace of each stage early and late."""
    first = [look for look in looks if look[1] == "prefill"]
    found: dict[str, Any] = {"mib_early": first[2][3], "mib_highest": max(look[3] for look in looks)}
    for stage in ("prefill", "refusal onset"):
        each = paces(looks, stage)
        part = max(1, len(each) // 4)
        early, late = statistics.median(each[:part]), statistics.median(each[-part:])
        found[stage] = {"ms_early": round(1000 * early, 3), "ms_late": round(1000 * late, 3)}
    return found


def random_model(folder: Path) -> str:
    """Two layers of random weights over the embedded testbed's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = deepalign.load_model("testbed:base", device="cpu").tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--model", default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where runs are kept; default a temporary one")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and keep nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = options.model or random_model(folder)
        found = measure(model, folder, options.prompts, options.shards, options.new_tokens)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for part, stage, done, mib, seconds in found["looks"]:
        sys.stdout.write(f"{part:>8}  {stage:<14} {done:>7}  {mib:7.1f} MiB  {seconds:8.1f} s CPU\n")
    kept = {"num_prompts": options.prompts, "num_shards": options.shards, "new_tokens": options.new_tokens, **found}
    name = f"growth_{options.prompts}_cpu{os.cpu_count()}_{datetime.datetime.now(datetime.UTC).date()}.json"
    path = ROOT / "measurements" / name
    path.write_text(json.dumps({**kept, "environment": environment()}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
