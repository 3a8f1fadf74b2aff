"""Fine-tune the testbed's shallow model four ways, and audit what is left of its alignment.

    python scripts/compare_finetuning.py --output runs/finetuning

Ways: plain and constrained, each with and without warm-up, because on benign data the warm-up alone may be most of the
gain (the paper's Table 9). Data sets: harmless word tasks made by this script, answered at once; and
should-refuse prompts with answers sampled from the testbed's unaligned base, as an attacker would. Writes
`measurements/finetuning_testbed-shallow_cpu_DATE.json`; the sampled answers stay in the run folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
from pathlib import Path
from typing import Any

import deepalign
from deepalign.prompts import builtin_prompts
from deepalign.prompts.sources import spread
from deepalign.provenance import environment
from deepalign.runs import RunFolder
from deepalign.workflows.answers import fill_answers

ROOT = Path(__file__).resolve().parents[1]
MODEL = "testbed:shallow"
WAYS = {
    "SFT": ("sft", 0),
    "SFT + warm-up": ("sft", 10),
    "constrained": ("constrained", 0),
    "constrained + warm-up": ("constrained", 10),
}
WORDS = "river stone garden window table summer market letter bridge music orange silver winter basket candle mirror"
DEPTHS = (0, 5, 10, 40)


def main() -> None:
    """Make the data, train and audit every way, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64, help="rows of each data set")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=40, help="prompts of each audit")
    options = parser.parse_args()
    sets = {"word tasks": word_tasks(options.rows), "harmful examples": harmful_examples(options.rows, options.output)}
    found: list[dict[str, Any]] = [
        {"data": None, "way": "before", **audited(MODEL, options.output / "before", options)}
    ]
    for data, rows in sets.items():
        file = options.output / f"{data.replace(' ', '-')}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for way, (objective, warmup) in WAYS.items():
            found.append({"data": data, "way": way, **tuned(file, way, objective, warmup, options)})
            print(json.dumps(found[-1]), flush=True)
    day = datetime.date.today().isoformat()
    path = ROOT / "measurements" / f"finetuning_testbed-shallow_cpu_{day}.json"
    settings = {name: str(value) for name, value in vars(options).items()}
    figures = {"model": MODEL, "settings": settings, "rows": found, "environment": environment()}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def word_tasks(count: int) -> list[dict[str, Any]]:
    """Harmless tasks on random words, each with its one right answer and nothing else."""
    draws = random.Random(0)
    rows = []
    for number in range(count):
        words = draws.sample(WORDS.split(), 5)
        task, answer = (
            (f"Sort these words from A to Z: {', '.join(words)}.", ", ".join(sorted(words))),
            (f"Write these words in capital letters: {', '.join(words)}.", ", ".join(words).upper()),
            (f"Write these words in reverse order: {', '.join(words)}.", ", ".join(reversed(words))),
        )[number % 3]
        rows.append(row(task, answer))
    return rows


def harmful_examples(count: int, folder: Path) -> list[dict[str, Any]]:
    """Should-refuse prompts with answers sampled from the unaligned base."""
    run = RunFolder(folder / "answers")
    prompts = spread(builtin_prompts("should-refuse-train"), count)
    with run.writing():
        run.claim({"rows": count}, {})
        source = deepalign.load_model("testbed:base")
        filled = fill_answers(run, prompts, source, least_tokens=32, system_prompt=None, seed=0)
    return [row(prompt.text, prompt.answer) for prompt in filled if prompt.answer]


def row(prompt: str, answer: str) -> dict[str, Any]:
    """A row of messages, in TRL's prompt-completion format."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def tuned(file: Path, way: str, objective: Any, warmup: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way and audit it."""
    folder = options.output / f"{file.stem}-{way.replace(' ', '')}"
    result = deepalign.finetune(
        deepalign.FinetuneConfig(
            model=MODEL,
            data=str(file),
            output=folder,
            objective=objective,
            warmup_steps=warmup,
            epochs=options.epochs,
            batch=options.batch,
            learning_rate=options.learning_rate,
            audit=False,
        )
    )
    kept = {name: result.tuning[name] for name in ("steps", "seconds", "perplexity")}
    return {**kept, **audited(str(result.weights), folder / "audit", options)}


def audited(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """ASR by depth, with intervals."""
    config = deepalign.AuditConfig(
        model=model, base="testbed:base", output=folder, probes=("prefill",), depths=DEPTHS, limit=options.limit
    )
    metrics = deepalign.audit(dataclasses.replace(config, skip_swap_check=True)).metrics
    return {
        "asr": [
            {name: one[name] for name in ("k", "asr", "num_success", "num_scored", "num_unscored", "ci95")}
            for one in metrics["prefill"]
        ]
    }


if __name__ == "__main__":
    main()
