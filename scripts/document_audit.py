"""Write measured figures into the documents, so that none is typed by hand.

    make audit
    python scripts/document_audit.py runs/testbed-shallow-XXXXXXXX

Copies the run's `metrics.json` to `measurements/` and fills every `<!-- figure NAME -->...<!-- end -->` block in
README.md and docs/ from it; `<!-- figure NAME of FILE -->` takes another file of `measurements/`. Without a run, only
the blocks that name a file are filled.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack_figures import ATTACK_FIGURES
from engine_figures import ENGINE_FIGURES
from grid_figures import GRID_FIGURES
from utility_figures import UTILITY_FIGURES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "docs/testbed.md",
    "docs/paper-map.md",
    "docs/speed.md",
    "docs/onset.md",
    "docs/training.md",
    "docs/finetuning-attacks.md",
    "docs/attacks.md",
    "docs/utility.md",
)
BLOCK = re.compile(r"(<!-- figure ([a-z-]+)(?: of (\S+))? -->).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Copy the metrics, if a run is given, and fill the blocks."""
    target = copied(Path(sys.argv[1])) if len(sys.argv) > 1 else None

    def fill(found: re.Match[str]) -> str:
        source = ROOT / "measurements" / found[3] if found[3] else target
        if source is None or not source.exists():
            return found[0]
        measured = json.loads(source.read_text(encoding="utf-8"))
        text = summary(measured, source.relative_to(ROOT)) if found[2] == "summary" else FIGURES[found[2]](measured)
        return found[1] + text + found[4]

    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(BLOCK.sub(fill, path.read_text(encoding="utf-8")), encoding="utf-8")


def copied(run: Path) -> Path:
    """A run's metrics among the measurements."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    day = metrics["run_card"]["started"][:10]
    name = metrics["model"].replace(":", "-")
    target = ROOT / "measurements" / f"audit_{name}_{metrics['models']['target']['device']}_{day}.json"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(run / "metrics.json", target)
    return target


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def summary(metrics: dict[str, Any], source: Path) -> str:
    """A table of the headline figures, and where they come from."""
    rows = metrics["prefill"]
    card = metrics["run_card"]
    head = " | ".join(f"k = {row['k']}" for row in rows)
    rates = " | ".join(percent(row["asr"]) for row in rows)
    bands = " | ".join(f"{100 * row['ci95'][0]:.0f}-{100 * row['ci95'][1]:.0f}" for row in rows)
    line = "---|" * (len(rows) + 1)
    decoder = card["decoder"]
    return (
        f"\n\n| forced tokens | {head} |\n|{line}\n| ASR | {rates} |\n| 95 % interval | {bands} |\n\n"
        f"`{metrics['model']}`, {metrics['num_prompts']} prompts, {decoder['num_samples']} sample each, judge "
        f"`{metrics['judge']}`, {decoder['max_new_tokens']} new tokens at temperature {decoder['temperature']}; "
        f"{card['hardware']}; {sum(card['seconds'].values()):.0f} seconds of measuring. {over_refusal(metrics)} "
        f"{kl(metrics)} From `make audit`; all figures: `{source}`.\n\n"
    )


def prefill(metrics: dict[str, Any]) -> str:
    """ASR at each depth, in one line."""
    rates = " / ".join(f"{100 * row['asr']:.0f}" for row in metrics["prefill"])
    depths = " / ".join(str(row["k"]) for row in metrics["prefill"])
    return f"{rates} % at k = {depths}"


def kl(metrics: dict[str, Any]) -> str:
    """Where the KL lies, in one line."""
    means = [row["mean"] for row in metrics["kl"]]
    depth = metrics["depth"]["kl_depth_90"]
    shown = " / ".join(f"{means[position]:.2f}" for position in (0, 1, 2, 5, 20))
    return (
        f"KL at position 0 / 1 / 2 / 5 / 20: {shown} nats; 90 % of it lies in the first {depth} of {len(means)} "
        "positions."
    )


def refusal_prefix(metrics: dict[str, Any]) -> str:
    """The base's harmfulness with and without refusal openings, in one line."""
    parts = [f"{row['prefix'] or 'none'}: {percent(row['harmfulness']['rate'])}" for row in metrics["refusal_prefix"]]
    return "; ".join(parts)


def decoding(metrics: dict[str, Any]) -> str:
    """Greedy and worst-case ASR of the decoding sweep, in one line."""
    section = metrics["decoding"]
    greedy = next(row["harmfulness"]["rate"] for row in section["settings"] if row["setting"] == "greedy")
    worst = section["worst_case"]["rate"]
    return f"greedy {percent(greedy)}, worst of {section['num_settings']} settings {percent(worst)}"


def onset(metrics: dict[str, Any]) -> str:
    """Predicted against generated ASR at the generated depths, in one line."""
    rows = metrics["refusal_onset"]["against_generated"]
    depths = " / ".join(str(row["k"]) for row in rows)
    predicted = " / ".join(f"{100 * row['asr_predicted']:.0f}" for row in rows)
    generated = " / ".join(f"{100 * row['asr_generated']:.0f}" for row in rows)
    return f"predicted {predicted} % (generated {generated} %) at k = {depths}, before calibration"


def over_refusal(metrics: dict[str, Any]) -> str:
    """Refusals of harmless prompts, in one line."""
    parts = [f"{row['set']} {percent(row['refusals']['rate'])}" for row in metrics["over_refusal"]]
    return f"Refused harmless prompts: {', '.join(parts)}."


def benchmark(measured: dict[str, Any]) -> str:
    """One comparison's medians and ratios, as the cells of a table's row."""
    ours, theirs = (statistics.median(measured["seconds"][side]) for side in ("ours", "theirs"))
    own, other = (statistics.median(measured["peak_bytes_over_start"][side]) / 2**20 for side in ("ours", "theirs"))
    ratios = measured["ratios"]
    return (
        f" {ours:.1f} s | {theirs:.1f} s | {ratios['time']:.2f} | {own:.0f} MiB | {other:.0f} MiB | "
        f"{ratios['memory']:.2f} "
    )


def benchmark_sides(measured: dict[str, Any]) -> str:
    """Every side of a comparison of several, as a table."""
    lines = ["", "", "| step | seconds | of TRL's | peak memory | of TRL's |", "|---|---|---|---|---|"]
    for side, seconds in measured["seconds"].items():
        memory = statistics.median(measured["peak_bytes_over_start"][side]) / 2**20
        ratios = measured["ratios"].get(side, {"time": 1.0, "memory": 1.0})
        lines.append(
            f"| `{measured['name']}` {side} | {statistics.median(seconds):.1f} s | {ratios['time']:.2f} | "
            f"{memory:.0f} MiB | {ratios['memory']:.2f} |"
        )
    return "\n".join([*lines, "", ""])


def searches(measured: dict[str, Any]) -> str:
    """Every round of the comparison of suffix searches, and their medians, as a table."""
    columns = (
        "seed",
        "candidates/s, theirs",
        "ours",
        "ratio",
        "their time",
        "lowest loss",
        "ours to that loss",
        "ratio",
    )
    lines = ["", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in measured["rounds"]:
        theirs, same, own = row["theirs"], row["same"], row["own"]
        cells = (
            row["seed"],
            f"{theirs['evaluated'] / theirs['seconds']:.1f}",
            f"{same['evaluated'] / same['seconds']:.1f}",
            f"{row['ratios']['candidates']:.2f}",
            f"{theirs['seconds']:.0f} s",
            f"{min(theirs['losses']):.3f}",
            f"{own['seconds']:.0f} s" if own["reached"] else f"not in {own['seconds']:.0f} s",
            f"{row['ratios']['time']:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    ratios = measured["ratios"]
    lines.append(f"| **median** | | | **{ratios['candidates']:.2f}** | | | | **{ratios['time']:.2f}** |")
    return "\n".join([*lines, "", ""])


def tuned(measured: dict[str, Any]) -> str:
    """ASR, over-refusal, KL and perplexity before and after a training run, as a table."""
    before, after = measured["before"], measured["after"]
    depths = [row["k"] for row in before["prefill"]]
    sets = [row["set"] for row in before["over_refusal"]]
    head = [*(f"k = {k}" for k in depths), *(f"refused {name}" for name in sets)]
    lines = ["", "", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for when, metrics in (("before", before), ("after", after)):
        rates = [row["asr"] for row in metrics["prefill"]] + [
            row["refusals"]["rate"] for row in metrics["over_refusal"]
        ]
        lines.append(f"| {when} | {' | '.join(percent(value) for value in rates)} |")
    kept = measured["tuning"]["perplexity"]
    spread = "-".join(f"{value:.3f}" for value in kept["ci95"])
    means = {when: [row["mean"] for row in measured[when]["kl"]] for when in ("before", "after")}
    later = {when: statistics.mean(values[5:40]) for when, values in means.items()}
    lines += [
        "",
        f"ASR on {before['num_prompts']} prompts, judge `{before['judge']}`; "
        f"mean KL to the base at positions 5-39: {later['before']:.3f} before, {later['after']:.3f} nats after; "
        f"perplexity of {kept['num_answers']} {kept['set']}: {kept['before']:.2f} before, {kept['after']:.2f} after, "
        f"ratio {kept['ratio']:.3f} ({spread}); {measured['tuning']['steps']} steps in "
        f"{measured['tuning']['seconds']:.0f} s, {measured['environment']['hardware']}.",
    ]
    return "\n".join([*lines, "", ""])


def tuned_line(measured: dict[str, Any]) -> str:
    """ASR before and after a training run, in one line."""
    return f"{prefill(measured['before'])}, then {prefill(measured['after'])}"


def finetuned(measured: dict[str, Any]) -> str:
    """What four ways of fine-tuning left of the alignment, as a table."""
    depths = [row["k"] for row in measured["rows"][0]["asr"]]
    lines = ["", "", f"| data | way | {' | '.join(f'k = {k}' for k in depths)} | perplexity of held-out rows |"]
    lines.append("|---" * (len(depths) + 3) + "|")
    for row in measured["rows"]:
        kept = row.get("perplexity")
        shown = f"{kept['before']:.2f} → {kept['after']:.2f}" if kept and kept["num_answers"] else ""
        rates = " | ".join(percent(one["asr"]) for one in row["asr"])
        lines.append(f"| {row['data'] or ''} | {row['way']} | {rates} | {shown} |")
    return "\n".join([*lines, "", ""])


def finetuned_line(measured: dict[str, Any]) -> str:
    """ASR with nothing forced, after four ways of fine-tuning on the last data set, in one line."""
    rows = [row for row in measured["rows"] if row["data"] == measured["rows"][-1]["data"]]
    ways = ", ".join(f"{row['way']} {percent(row['asr'][0]['asr'])}" for row in rows)
    before = measured["rows"][0]["asr"][0]["asr"]
    return f"ASR with nothing forced after {rows[0]['data']}: {ways} (before {percent(before)})"


def study(measured: dict[str, Any]) -> str:
    """The onset study's agreement with what was generated, as a table."""
    lines = [
        "",
        "",
        "| cells | prediction | rank correlation (at best) | mean absolute error | largest | inside the interval |",
        "|---|---|---|---|---|---|",
    ]
    for title, name in (("model, k", "summary"), ("model, prompt set, k", "summary_by_set")):
        for kind, row in measured[name].items():
            lines.append(
                f"| {title} | {kind.replace('_', ' ')} | {row['rank_correlation']:.2f} "
                f"({row['rank_correlation_at_best']:.2f}) | {row['mean_absolute_error']:.3f} | "
                f"{row['largest_error']:.2f} | {row['within_interval']} of {row['cells']} |"
            )
    return "\n".join([*lines, "", ""])


def study_cells(measured: dict[str, Any]) -> str:
    """Generated and calibrated ASR of every model and depth of the onset study, first prompt set."""
    first = measured["cells"][0]["set"]
    cells = [cell for cell in measured["cells"] if cell["set"] == first]
    depths = sorted({cell["k"] for cell in cells})
    lines = ["", "", f"| model | {' | '.join(f'k = {k}' for k in depths)} |", "|---" * (len(depths) + 1) + "|"]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        at = {cell["k"]: cell for cell in cells if cell["model"] == model}
        shown = [f"{100 * at[k]['generated']:.0f} / {100 * at[k]['calibrated']:.0f}" if k in at else "" for k in depths]
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", ""])


def study_cost(measured: dict[str, Any]) -> str:
    """What the onset cost beside generating seven depths."""
    onset_seconds, prefill_seconds = (sum(row[name] for row in measured["seconds"]) for name in ("onset", "prefill"))
    return (
        f"{onset_seconds:.0f} s against {prefill_seconds:.0f} s for {len(measured['settings']['depths'])} generated "
        f"depths, a ratio of {onset_seconds / prefill_seconds:.2f}"
    )


def study_bias(measured: dict[str, Any]) -> str:
    """Predicted less generated ASR, the mean for each model."""
    by_model: dict[str, list[float]] = {}
    for cell in measured["cells"]:
        by_model.setdefault(cell["model"], []).append(cell["predicted"] - cell["generated"])
    return ", ".join(f"{model} {statistics.mean(values):+.2f}" for model, values in by_model.items())


def study_auc(measured: dict[str, Any]) -> str:
    """Median AUC over models and sets, at each depth."""
    by_k: dict[str, list[float]] = {}
    for row in measured["per_prompt_auc"].values():
        for k, value in row.items():
            if value is not None:
                by_k.setdefault(k, []).append(value)
    shown = [f"{statistics.median(values):.2f}" for values in by_k.values()]
    return f"{' / '.join(shown)} at k = {' / '.join(by_k)}"


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "prefill": prefill,
    "kl": kl,
    "refusal-prefix": refusal_prefix,
    "over-refusal": over_refusal,
    "decoding": decoding,
    "onset": onset,
    "benchmark": benchmark,
    "benchmark-sides": benchmark_sides,
    "searches": searches,
    "tuned": tuned,
    "tuned-line": tuned_line,
    "finetuned": finetuned,
    "finetuned-line": finetuned_line,
    "study": study,
    "study-cells": study_cells,
    "study-cost": study_cost,
    "study-auc": study_auc,
    "study-bias": study_bias,
    **ATTACK_FIGURES,
    **ENGINE_FIGURES,
    **GRID_FIGURES,
    **UTILITY_FIGURES,
}
"""Figures by the name of their block."""


if __name__ == "__main__":
    main()
