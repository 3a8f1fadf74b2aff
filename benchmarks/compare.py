"""Several ways of doing the same work, timed in turn, with their peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

_PAGE = 4096
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The figures of one benchmark."""

    name: str
    device: str
    figures: dict[str, Any]

    @property
    def lines(self) -> list[str]:
        """The closing lines: one for two sides, else one for each side but the one that it is measured against."""
        ratios = self.figures["ratios"]
        by_side = {"": ratios} if "time" in ratios else {f" {side}": own for side, own in ratios.items()}
        return [
            f"{self.name}{side} time_ratio={own['time']:.3f} memory_ratio={own['memory']:.3f}"
            for side, own in by_side.items()
        ]


def compare(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    repeats: int,
    device: torch.device,
    settings: dict[str, Any],
) -> Comparison:
    """Time both sides `repeats` times in turn, after one warm-up each; medians and their ratio."""
    found = compare_sides(
        name, {"ours": ours, "theirs": theirs}, against="theirs", repeats=repeats, device=device, settings=settings
    )
    return replace(found, figures={**found.figures, "ratios": found.figures["ratios"]["ours"]})


def compare_sides(
    name: str,
    sides: Mapping[str, Callable[[], Any]],
    *,
    against: str,
    repeats: int,
    device: torch.device,
    settings: dict[str, Any],
    seed: int = 0,
) -> Comparison:
    """Time every side `repeats` times in turn, after one warm-up each; medians, and their ratios to one of them.

    Args:
        name: The benchmark's.
        sides: The work of each side, by name.
        against: The side that the others are measured against.
        repeats: Timed runs of each side.
        device: Where the work is done.
        settings: Written beside the figures.
        seed: Of the order in which more than two sides are run, drawn anew for each round.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, list[int]] = {side: [] for side in sides}
    draw = random.Random(seed)
    for repeat in range(repeats + 1):
        for side in _order(list(sides), repeat, draw):
            took, peak = _measured(sides[side], device)
            if repeat > 0:
                seconds[side].append(took)
                memory[side].append(peak)
    times = {side: statistics.median(values) for side, values in seconds.items()}
    peaks = {side: statistics.median(values) for side, values in memory.items()}
    figures = {
        "name": name,
        "settings": settings,
        "seconds": seconds,
        "peak_bytes_over_start": memory,
        "ratios": {
            side: {"time": times[side] / times[against], "memory": peaks[side] / max(1, peaks[against])}
            for side in sides
            if side != against
        },
    }
    return Comparison(name=name, device=device.type, figures=figures)


def _order(sides: list[str], repeat: int, draw: random.Random) -> list[str]:
    """No side always runs on another's warm caches: two sides turn round, more are shuffled."""
    if len(sides) == 2:
        return sides if repeat % 2 else sides[::-1]
    return draw.sample(sides, len(sides))


def _measured(work: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()
    watch = _ResidentMemory()
    started = time.perf_counter()
    with watch:
        work()
    return time.perf_counter() - started, watch.peak_over_start


def _give_back_freed_memory() -> None:
    """Return what the allocator holds of freed memory, or the next side would grow inside it unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _ResidentMemory:
    """Highest resident memory while a block runs, over what it was before, sampled by a thread."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._start = self._peak = 0

    @property
    def peak_over_start(self) -> int:
        return self._peak - self._start

    def __enter__(self) -> _ResidentMemory:
        self._start = self._peak = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
