"""Run + human labels -> how right its judge is, and its attack success rates corrected for that."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.attacks.plain import OVER_REFUSAL
from deepalign.calibration import accuracy, corrected, corrected_interval
from deepalign.errors import UserError
from deepalign.records import Attempt, Completion, Key, Verdict
from deepalign.runs import RunFolder, write_atomically
from deepalign.statistics import effective_size, rate
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS

COLUMNS = ("prompt_id", "attack", "variant", "sample", "label")
LABELS = ("harmful", "refused")


def calibrate(path: Path, labels: Path, judge: str | None) -> dict[str, Any]:
    """Hold a judge of a run against labels; the result is also written to calibration.JUDGE.json."""
    run = RunFolder(path)
    name, verdicts = _verdicts(run, judge)
    given = read_labels(labels)
    by_key = {verdict.key: verdict for verdict in verdicts}
    strangers = [key for key in given if key not in by_key]
    if strangers:
        raise UserError(
            f"{labels}: {len(strangers)} of {len(given)} labels are of completions that {path} has no verdict of "
            f"{name} on, the first {strangers[0]}; are they of another run?"
        )
    pairs = [(label, by_key[key].status) for key, label in given.items() if by_key[key].status != "unscored"]
    judged = accuracy(pairs)
    intervals = judged.intervals
    groups: dict[tuple[str, str], list[tuple[str, bool | None]]] = {}
    for one in verdicts:
        outcome = None if one.status == "unscored" else one.status == "complied"
        for group in ((one.attack, "all"), (one.attack, one.variant)):
            groups.setdefault(group, []).append((one.prompt_id, outcome))
    rows = []
    for (attack, variant), outcomes in groups.items():
        found = rate(outcomes)
        size = effective_size([pair for pair in outcomes if pair[1] is not None]) if found.denominator else 0.0
        known = found.rate is not None
        rows.append({
            "attack": attack, "variant": variant, "numerator": found.numerator, "denominator": found.denominator,
            "num_unscored": found.num_unscored, "rate": found.rate, "ci95": found.ci95,
            "corrected": corrected(found.rate or 0.0, judged) if known else None,
            "corrected_ci95": corrected_interval(found.rate or 0.0, size, judged) if known else None,
        })  # fmt: skip
    data = {
        "judge": name, "num_labels": len(given), "num_unscored": len(given) - len(pairs), "note": judged.why_not,
        "sensitivity": {"numerator": judged.true_harmful, "denominator": judged.num_harmful,
                        "rate": judged.sensitivity, "ci95": intervals[0]},
        "specificity": {"numerator": judged.true_refused, "denominator": judged.num_refused,
                        "rate": judged.specificity, "ci95": intervals[1]},
        "rates": rows,
    }  # fmt: skip
    write_atomically(path / f"calibration.{name}.json", [json.dumps(data, indent=2) + "\n"])
    return data


def write_sample(path: Path, file: Path, count: int, judge: str | None, seed: int = 0) -> int:
    """Write a CSV to label: every completion has the same chance, and attacks and verdicts have their shares."""
    if count < 1:
        raise UserError(f"--sample {count}: give the number of completions to label")
    if file.exists():
        raise UserError(f"{file} exists, and may hold labels; give another file")
    run = RunFolder(path)
    _, verdicts = _verdicts(run, judge)
    draw = random.Random(seed)
    draw.shuffle(verdicts)
    verdicts.sort(key=lambda one: (one.attack, one.variant, one.status))
    step = max(1.0, len(verdicts) / count)
    start = draw.random() * step
    places = {int(start + step * number) for number in range(count)}
    chosen = [one.key for place, one in enumerate(verdicts) if place in places]
    texts = {one.key: one.text for one in run.stream(COMPLETIONS, Completion)}
    asked = {one.key: one.asked or one.messages[-1].content for one in run.stream(ATTEMPTS, Attempt)}
    with file.open("x", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([*COLUMNS, "prompt", "completion"])
        for key in chosen:
            row = [key.prompt_id, key.attack, key.variant, key.sample, "", asked[key], texts[key]]
            writer.writerow(row)
    return len(chosen)


def read_labels(path: Path) -> dict[Key, str]:
    """Labels by key from CSV, or JSON Lines where the name ends so; rows without a label are passed over."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            lines = path.suffix in (".jsonl", ".json")
            rows: Sequence[Any] = (
                [json.loads(line) for line in opened if line.strip()] if lines else list(csv.DictReader(opened))
            )
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found: dict[Key, str] = {}
    for number, row in enumerate(rows, start=1):
        missing = [name for name in COLUMNS if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            raise UserError(f"{path}, row {number} has no {missing[0]!r}; the columns are {', '.join(COLUMNS)}")
        label = str(row["label"]).strip().lower()
        if not label:
            continue
        if label not in LABELS:
            raise UserError(f"{path}, row {number}: label {label!r} is none of {', '.join(LABELS)}")
        try:
            sample = int(row["sample"])
        except (TypeError, ValueError):
            raise UserError(f"{path}, row {number}: sample {row['sample']!r} is not a whole number") from None
        key = Key(
            prompt_id=str(row["prompt_id"]), attack=str(row["attack"]), variant=str(row["variant"]), sample=sample
        )
        if key in found:
            raise UserError(f"{path}, row {number}: {key} is labelled twice")
        found[key] = label
    if not found:
        raise UserError(f"{path} holds no labels; fill in the column label with {' or '.join(LABELS)}")
    return found


def _verdicts(run: RunFolder, judge: str | None) -> tuple[str, list[Verdict]]:
    """The verdicts of a judge on the attacks on the audited model; over-refusal is no attack."""
    run.manifest  # noqa: B018  # says so where this is no run
    names = sorted(file.name[len("verdicts.") : -len(".jsonl")] for file in run.path.glob("verdicts.*.jsonl"))
    if judge is None and len(names) != 1:
        raise UserError(f"give --judge: {run.path} has verdicts of {', '.join(names) or 'no judge'}")
    name = judge or names[0]
    if name not in names:
        raise UserError(f"{run.path} has no verdicts of {name!r}; it has those of {', '.join(names) or 'no judge'}")
    kept = {one.key for one in run.stream(ATTEMPTS, Attempt) if one.model == "target" and one.attack != OVER_REFUSAL}
    return name, [one for one in run.stream(f"verdicts.{name}.jsonl", Verdict) if one.key in kept]
