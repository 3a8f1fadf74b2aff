"""How the cost of an audit's generation grows: with prompts, depths, answer length, vocabulary and model size.

    python -m benchmarks.growth                                     # small random models on the CPU
    python -m benchmarks.growth --device cuda --output FILE         # shapes of 1B and 7B models

One axis moves at a time, the others stay; random weights, no row stops early. Written for each point: seconds, tokens a
second, peak memory over what was held, and what `deepalign plan` needs to be checked against it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import _ResidentMemory
from benchmarks.engine import SHAPES, attempts, ceilings, random_llama
from deepalign.generation import generate
from deepalign.runs import environment

Point = dict[str, Any]
CPU: Point = {"shape": "small", "prompts": 8, "depths": 3, "new_tokens": 24, "vocab_size": 8000}
GPU: Point = {"shape": "1b", "prompts": 64, "depths": 7, "new_tokens": 64, "vocab_size": 32000}
CPU_AXES: dict[str, tuple[Any, ...]] = {
    "prompts": (4, 8, 16, 32),
    "depths": (1, 3, 7),
    "new_tokens": (12, 24, 48, 96),
    "vocab_size": (2000, 8000, 32000, 128000),
    "shape": ("tiny", "small", "medium"),
}
GPU_AXES: dict[str, tuple[Any, ...]] = {
    "prompts": (16, 64, 256, 512),
    "depths": (1, 3, 7),
    "new_tokens": (32, 64, 128, 256),
    "vocab_size": (8000, 32000, 128000),
    "shape": ("small", "1b", "7b"),
}
_PROMPT_TOKENS = 60


def measured(point: Point, device: torch.device, known: dict[tuple[str, int], Any]) -> Point:
    """The cost of one point, after one warm-up of few tokens."""
    key = (point["shape"], point["vocab_size"])
    if key not in known:
        known.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        known[key] = random_llama(point["shape"], device, point["vocab_size"])
    model = known[key]
    jobs = attempts(point["prompts"], _PROMPT_TOKENS, point["new_tokens"], point["vocab_size"], point["depths"])
    list(generate(model, attempts(2, _PROMPT_TOKENS, 2, point["vocab_size"], 2), stop_ids=()))
    gc.collect()
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        written = sum(len(one.token_ids) for one in generate(model, jobs, stop_ids=()))
        torch.cuda.synchronize(device)
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before
    else:
        with (watch := _ResidentMemory()):
            written = sum(len(one.token_ids) for one in generate(model, jobs, stop_ids=()))
            seconds = time.perf_counter() - started
        peak = watch.peak_over_start
    assert written == len(jobs) * point["new_tokens"], "a row was cut"
    config = model.config
    return {
        **point,
        "rows": len(jobs),
        "input_tokens": sum(len(job.ids) for job in jobs),
        "distinct_input_tokens": sum(len(job.ids) for job in jobs[point["depths"] - 1 :: point["depths"]]),
        "seconds": seconds,
        "tokens_per_second": written / seconds,
        "peak_bytes_over_start": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": {
            name: getattr(config, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "tie_word_embeddings",
            )
        },
    }


def main() -> None:
    """Measure every axis, print a line for each point, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="*", default=[], choices=list(CPU_AXES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    centre, axes = (GPU, GPU_AXES) if device.type == "cuda" else (CPU, CPU_AXES)
    known: dict[tuple[str, int], Any] = {}
    limits = ceilings(device)
    found = []
    for axis in options.axes or axes:
        for value in axes[axis]:
            row = measured({**centre, axis: value}, device, known)
            found.append({"axis": axis, **row})
            print(
                f"{axis} {value}: {row['seconds']:.2f} s, {row['tokens_per_second']:.0f} tokens/s, "
                f"{row['peak_bytes_over_start'] / 2**20:.0f} MiB",
                flush=True,
            )
    if options.output:
        data = {
            "name": "growth",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "shapes": SHAPES,
            "ceilings": limits,
            "points": found,
            "environment": environment(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
