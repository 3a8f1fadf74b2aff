"""What each option of the suffix search does alone: the loss after the same number of candidates that the model read.

    python scripts/measure_suffix_options.py

On `testbed:shallow`, a few prompts with a seed each, and the target that an audit's own search has. Candidates are
counted, not seconds, so that other work on the machine changes nothing; what an option costs beside them (a draft
model's passes, a first reading in bfloat16) is told by its processor time. Writes
`measurements/suffix-options_testbed-shallow_cpu_DATE.json`, losses and counts without prompts or suffixes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepalign.models import LoadedModel, load_model
from deepalign.prompts import builtin_prompts
from deepalign.runs import environment
from deepalign.suffix.behaviours import Behaviour, behaviour, suffix_text
from deepalign.suffix.drafting import Draft
from deepalign.suffix.search import SearchSettings, SearchState, search

ROOT = Path(__file__).resolve().parents[1]
TARGET = "Sure, here is"
PLAIN = SearchSettings(steps=10_000, search_width=32, topk=64, early_stop=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffer 1": {"buffer_size": 1},
    "mellowmax 1": {"mellowmax": 1.0},
    "momentum 0.5": {"momentum": 0.5},
    "replace 3, falling over 10 steps": {"n_replace": 3, "n_replace_steps": 10},
    "merge 6": {"merge": 6},
    "greedy order": {"order": "greedy"},
    "screen, 4 read exactly": {"screen": True, "rescored": 4},
    "draft": {},
}


class _Enough(Exception):
    """So many candidates were read."""


def main() -> None:
    """Search with every option and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=320, help="that the model reads in each search")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model("testbed:shallow", dtype="float32", device="cpu")
    small = load_model("testbed:base", dtype="float32", device="cpu")
    prompts = builtin_prompts("should-refuse-train")[: options.prompts]
    rows: list[dict[str, Any]] = []
    for name, changes in OPTIONS.items():
        for seed, prompt in enumerate(prompts):
            found = searched(loaded, small if name == "draft" else None, prompt.text, seed, changes, options.candidates)
            rows.append({"option": name, "seed": seed, **found})
        losses = [row["best_loss"] for row in rows if row["option"] == name]
        print(f"{name}: median lowest loss {statistics.median(losses):.3f}", flush=True)
    found = {
        "name": "suffix-options",
        "settings": {"candidates": options.candidates, "target": TARGET, "prompts": len(prompts), "dtype": "float32"},
        "rows": rows,
        "environment": environment(),
    }
    day = datetime.date.today().isoformat()
    path = ROOT / "measurements" / f"suffix-options_testbed-shallow_cpu_{day}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def searched(
    loaded: LoadedModel, small: LoadedModel | None, text: str, seed: int, changes: dict[str, Any], most: int
) -> dict[str, Any]:
    """One search, until the model has read so many candidates."""
    at = _behaviour(loaded, text)
    draft = None
    if small is not None:
        draft = Draft(small.model, small.tokenizer, [_behaviour(small, text)], small.fingerprint)
    states: list[SearchState] = []

    def on_step(state: SearchState) -> None:
        states[:] = [state]
        if state.evaluated >= most:
            raise _Enough

    started = time.process_time()
    settings = replace(PLAIN, seed=seed, **changes)
    with contextlib.suppress(_Enough):
        search(loaded.model, loaded.tokenizer, [at], settings, on_step=on_step, draft=draft)
    (state,) = states
    # With a mellowmax the search's own number is another: all are compared by the mean.
    mean = search(loaded.model, loaded.tokenizer, [at], replace(PLAIN, steps=0, initial=_text(loaded, at, state)))
    return {
        "best_loss": mean.losses[0],
        "steps": state.step,
        "evaluated": state.evaluated,
        "drafted": state.drafted,
        "processor_seconds": round(time.process_time() - started, 1),
    }


def _behaviour(loaded: LoadedModel, text: str) -> Behaviour:
    return behaviour(loaded.tokenizer, loaded.template, prompt_id="p", text=text, target=TARGET)


def _text(loaded: LoadedModel, at: Behaviour, state: SearchState) -> str:
    return suffix_text(loaded.tokenizer, at, state.best)


if __name__ == "__main__":
    main()
