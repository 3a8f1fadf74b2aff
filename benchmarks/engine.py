"""How fast completions are written: our engine against plain `generate`, and against what the hardware allows.

    python -m benchmarks.engine                               # the testbed's model on the CPU
    python -m benchmarks.engine --shape 7b --device cuda      # random weights in the shape of a 7B model

The same attempts on all sides: prompts of one length, each with several prefixes of a random answer, a fixed number of
new tokens, no row stops early. `theirs` is one `generate` call for each batch of as many rows as ours has; `unrecorded`
is ours without CUDA graphs. The bound is the larger of two times for each step: reading weights and keys once at the
memory's measured rate, and multiplying at the measured rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepalign import generation
from deepalign.generation import Job, generate
from deepalign.records import Sampling
from deepalign.runs import environment

DEPTHS = (0, 5, 10, 20, 40, 80, 160)
_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "tiny": (64, 128, 2, 4, 4),
    "small": (256, 768, 6, 8, 4),
    "medium": (512, 1536, 12, 8, 4),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
"""Sizes of Llama models, in the order of `_NAMES`."""


def random_llama(shape: str, device: torch.device, vocab_size: int = 32000) -> Any:
    """A Llama of random weights in a known shape, made on the device."""
    sizes = dict(zip(_NAMES, SHAPES[shape], strict=True))
    config = LlamaConfig(**sizes, vocab_size=vocab_size, max_position_embeddings=4096)
    with torch.device(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model.eval()


def attempts(
    num_prompts: int, prompt_tokens: int, new_tokens: int, vocab_size: int, num_depths: int = len(DEPTHS)
) -> list[Job]:
    """Random prompts with the first depths of a random answer, the deepest of each last."""
    draw = random.Random(0)
    jobs = []
    for number in range(num_prompts):
        ids = draw.choices(range(5, vocab_size), k=prompt_tokens + max(DEPTHS))
        jobs += [
            Job(ids=tuple(ids[: prompt_tokens + k]), sampling=Sampling(max_new_tokens=new_tokens), seed=number)
            for k in DEPTHS[:num_depths]
        ]
    return jobs


def plain(model: Any, jobs: list[Job], batch: int) -> int:
    """`generate` in left-padded batches of rows of like length; tokens written."""
    written = 0
    ordered = sorted(jobs, key=lambda job: len(job.ids))
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        width, sampling = max(len(job.ids) for job in part), part[0].sampling
        ids = torch.tensor([(0,) * (width - len(job.ids)) + job.ids for job in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in part], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.max_new_tokens,
            pad_token_id=0,
        )
        written += (out.shape[1] - width) * len(part)
    return written


def ours(model: Any, jobs: list[Job], batch: int) -> int:
    """Our engine; tokens written."""
    return sum(len(one.token_ids) for one in generate(model, jobs, stop_ids=(), max_batch=batch))


def unrecorded(model: Any, jobs: list[Job], batch: int) -> int:
    """Our engine with each kernel launched by itself."""
    real = generation.can_record
    generation.can_record = lambda *_: False  # type: ignore[assignment]
    try:
        return ours(model, jobs, batch)
    finally:
        generation.can_record = real


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations per second of a large bfloat16 product."""
    size = 8192 if device.type == "cuda" else 2048
    one, other = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind()
    large = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device, dtype=torch.bfloat16)
    product = _best(lambda: one @ other, device)
    copy = _best(lambda: large.clone(), device)
    return {"operations_per_second": 2 * size**3 / product, "bytes_per_second": 2 * large.numel() * 2 / copy}


def _best(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(8):
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bound(model: Any, jobs: list[Job], batch: int, limits: dict[str, float]) -> float:
    """Seconds under which nothing can write these tokens at these rates: decoding alone, prefixes shared."""
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()
    config = model.config
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    seconds = 0.0
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        new, rows = part[0].sampling.max_new_tokens, len(part)
        keys = per_token * (rows * new / 2 + sum(len(job.ids) for job in part) / len(DEPTHS))
        reading = (2 * weights + keys) / limits["bytes_per_second"]
        multiplying = 2 * weights * rows / limits["operations_per_second"]
        seconds += new * max(reading, multiplying)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every side in turn after one warm-up each."""
    device = torch.device(options.device)
    if options.shape == "testbed":
        from deepalign.models import load_model

        model = load_model("testbed:base", device=options.device).model
        vocab_size = model.config.vocab_size
    else:
        vocab_size = 32000
        model = random_llama(options.shape, device, vocab_size)
    jobs = attempts(options.prompts, options.prompt_tokens, options.new_tokens, vocab_size)
    sides: dict[str, Callable[[], int]] = {"ours": lambda: ours(model, jobs, options.batch)}
    if device.type == "cuda":
        sides["unrecorded"] = lambda: unrecorded(model, jobs, options.batch)
    if not options.only_ours:
        sides["theirs"] = lambda: plain(model, jobs, options.theirs_batch or options.batch)
    limits = ceilings(device)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, int] = {}
    tokens = len(jobs) * options.new_tokens
    for repeat in range(options.repeats + 1):
        for side, work in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            written = work()
            _wait(device)
            took = time.perf_counter() - started
            assert written == tokens, f"{side} wrote {written} of {tokens} tokens"
            if device.type == "cuda":
                peaks[side] = torch.cuda.max_memory_allocated(device)
            if repeat:
                seconds[side].append(took)
            print(f"{side}: {tokens / took:.0f} tokens/s ({took:.2f} s)", flush=True)
    least = bound(model, jobs, options.batch, limits)
    return {
        "name": f"engine_{options.shape}",
        "settings": vars(options) | {"output": None, "tokens": tokens, "rows": len(jobs), "dtype": str(model.dtype)},
        "seconds": seconds,
        "tokens_per_second": {side: tokens / min(took) for side, took in seconds.items()},
        "peak_bytes": peaks,
        "ceilings": limits,
        "bound_tokens_per_second": tokens / least,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "environment": environment(),
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--shape", choices=["testbed", *SHAPES], default="testbed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--theirs-batch", type=int, default=0, help="rows of a `generate` call; default --batch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    found = measure(options)
    print(json.dumps(found["tokens_per_second"] | {"bound": found["bound_tokens_per_second"]}))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
