"""Functions that the YAML files beside this one name: data of the built-in tasks, and how their answers are scored.

An answer that a metric cannot read is wrong, as the harness has it, and counted apart as `no_answer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from datasets import Dataset

from deepalign.tuning_sets.public import load_tuning_set
from deepalign.tuning_sets.rows import TaskItem, TuningSet
from deepalign.tuning_sets.scores import score
from deepalign.tuning_sets.tasks import benign_set
from deepalign.utility.code_runner import run_code
from deepalign.utility.instructions import instruction_items, kept

Rows = dict[str, Dataset]
_NUM_GENERATED = 100


def knowledge(**_: Any) -> Rows:
    """Questions of common knowledge with four choices, hand-written for this project."""
    text = resources.files("deepalign.utility").joinpath("knowledge.jsonl").read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}


def instructions(**_: Any) -> Rows:
    """Requests with constraints that a program can check."""
    return {"test": Dataset.from_list(instruction_items())}


def arithmetic(**_: Any) -> Rows:
    """Word problems, generated; the items that a model tuned on the set of that name is tested with."""
    return _rows(benign_set("arithmetic", 1, _NUM_GENERATED))


def extraction(**_: Any) -> Rows:
    """Fields to be read out of short messages, generated."""
    return _rows(benign_set("extraction", 1, _NUM_GENERATED))


def sql(**_: Any) -> Rows:
    """Questions about a table, generated; answers are run in SQLite."""
    return _rows(benign_set("sql", 1, _NUM_GENERATED))


def public(source: str, num_test: int | None = None, **_: Any) -> Rows:
    """A benign task of the paper's, fetched, or read from the user's copy."""
    return _rows(load_tuning_set(source, 1, num_test))


def _rows(found: TuningSet) -> Rows:
    rows = [
        {
            "system": next((turn.content for turn in item.messages if turn.role == "system"), ""),
            "question": item.messages[-1].content,
            "answer": item.answer,
            "context": item.context,
        }
        for item in found.test
    ]
    return {"test": Dataset.from_list(rows)}


def score_instructions(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether every constraint is kept, and the share of those that are."""
    found = kept(doc["checks"], results[0])
    return {
        "all_kept": float(all(found)),
        "kept": sum(found) / len(found),
        "no_answer": float(not results[0].strip()),
    }


def score_code(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the completed function passes its tests, in a process with limits."""
    body = results[0].split("```")[0]
    program = f"{doc['prompt']}{body}\n\n{doc['test']}\n\ncheck({doc['entry_point']})"
    return {"passed": float(not run_code(program)), "no_answer": float(not body.strip())}


def _scored_by(metric: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]:
    def scored(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        item = TaskItem(item_id="item", messages=(), answer=doc["answer"], context=doc.get("context") or "")
        found = score(metric, item, results[0])
        return {"score": found.value or 0.0, "no_answer": float(found.value is None)}

    return scored


score_arithmetic = _scored_by("gsm8k")
score_extraction = _scored_by("field")
score_sql = _scored_by("sql")
score_rouge = _scored_by("rouge1")
