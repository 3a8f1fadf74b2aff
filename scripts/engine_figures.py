"""Figures of the engine for `document_audit.py`: tokens a second, growth, steps of the suffix search."""

from __future__ import annotations

import statistics
from typing import Any


def engine(measured: dict[str, Any]) -> str:
    """Tokens a second of every side, beside the hardware's bound."""
    settings = measured["settings"]
    lines = ["", "", "| side | tokens/s | of the bound | peak memory |", "|---|---|---|---|"]
    limits, bound = measured["ceilings"], measured["bound_tokens_per_second"]
    for side, rate in measured["tokens_per_second"].items():
        peak = measured["peak_bytes"].get(side)
        memory = f"{peak / 2**30:.1f} GiB" if peak else "not measured"
        lines.append(f"| {side} | {rate:,.0f} | {rate / bound:.2f} | {memory} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`{settings['shape']}`, {settings['rows']} rows of {settings['prompts']} prompts, "
            f"{settings['new_tokens']} new tokens, {settings['dtype'].removeprefix('torch.')}, best of "
            f"{settings['repeats']}; {measured['device']}, torch {measured['torch']}. The bound, {bound:,.0f} "
            f"tokens/s, counts decoding alone, at {limits['operations_per_second'] / 1e12:,.2f} TFLOP/s and "
            f"{limits['bytes_per_second'] / 1e9:,.0f} GB/s as measured there.",
            "",
            "",
        ]
    )


def growth(measured: dict[str, Any]) -> str:
    """Every axis of the growth benchmark, a row for each point."""
    lines = [
        "",
        "",
        "| axis | value | rows | seconds | tokens/s | peak memory over weights |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['axis'].replace('_', ' ')} | {row[row['axis']]} | {row['rows']} | {row['seconds']:.2f} | "
        f"{row['tokens_per_second']:,.0f} | {row['peak_bytes_over_start'] / 2**20:,.0f} MiB |"
        for row in measured["points"]
    ]
    return "\n".join([*lines, "", f"{measured['device']}, torch {measured['torch']}.", "", ""])


def gcg_steps(measured: dict[str, Any]) -> str:
    """Candidates a second of both sides on a GPU, in one line."""
    rates = {
        side: statistics.median(row[side]["candidates_per_second"] for row in measured["rounds"])
        for side in ("ours", "theirs")
    }
    peaks = {
        side: max(row[side]["peak_bytes_over_start"] or 0 for row in measured["rounds"]) / 2**30
        for side in ("ours", "theirs")
    }
    return (
        f"{rates['ours']:,.0f} candidates/s against {rates['theirs']:,.0f}, with {peaks['ours']:.1f} GiB over the "
        f"weights against {peaks['theirs']:.1f}"
    )


ENGINE_FIGURES = {"engine": engine, "growth": growth, "gcg-steps": gcg_steps}
