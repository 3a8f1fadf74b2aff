"""Which tasks go by a short name: what the harness calls each, and which of its numbers is the score.

The built-in tasks need no hub; the paper's and the usual ones read theirs from it, or from a local copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """One task or group under a short name."""

    task: str
    """Its name in the harness."""
    about: str
    metric: str
    """The metric that stands for the task where one number is wanted; the others are kept beside it."""
    filter: str = "none"
    """What read the answer out of the text before that metric."""
    chance: float | None = None
    """Score of blind guessing, where it is not the number of choices that decides it."""


BUILTIN_TASKS: Final = {
    "knowledge": Named(
        task="knowledge", metric="acc_norm", about="104 questions of common knowledge, four choices each"
    ),
    "arithmetic": Named(task="arithmetic", metric="score", about="100 word problems of one to three steps, generated"),
    "extraction": Named(task="extraction", metric="score", about="100 fields to read out of short messages, generated"),
    "instructions": Named(
        task="instructions", metric="all_kept", about="60 requests with constraints that a program can check"
    ),
    "sql": Named(task="sql", metric="score", about="100 questions on a table, the answer run in SQLite, generated"),
}
PAPER_TASKS: Final = {
    "samsum": Named(task="samsum", metric="score", about="dialogue summaries, ROUGE-1 (the paper's)"),
    "sql-create-context": Named(task="sql-create-context", metric="score", about="SQL queries, ROUGE-1 (the paper's)"),
    "gsm8k-paper": Named(task="gsm8k-paper", metric="score", about="GSM8K without examples, as the paper's code asks"),
}
USUAL_TASKS: Final = {
    "mmlu": Named(task="mmlu", metric="acc", about="57 subjects, four choices (cais/mmlu)"),
    "mmlu-pro": Named(
        task="mmlu_pro", metric="exact_match", filter="custom-extract", about="14 subjects, ten choices, reasoned"
    ),
    "bbh": Named(task="bbh", metric="exact_match", filter="get-answer", about="27 hard tasks, reasoned, 3 examples"),
    "math": Named(task="hendrycks_math", metric="exact_match", about="competition problems (MATH)"),
    "gsm8k": Named(
        task="gsm8k", metric="exact_match", filter="flexible-extract", about="word problems, 5 examples (openai/gsm8k)"
    ),
    "humaneval": Named(task="humaneval", metric="passed", about="Python functions against tests; needs --run-code"),
    "ifeval": Named(task="ifeval", metric="prompt_level_strict_acc", about="verifiable instructions (google/IFEval)"),
    "arc": Named(task="arc_challenge", metric="acc_norm", about="science questions (allenai/ai2_arc)"),
    "hellaswag": Named(task="hellaswag", metric="acc_norm", about="how a text goes on"),
    "truthfulqa": Named(task="truthfulqa_mc2", metric="acc", about="questions with common false answers"),
}
TASKS: Final = BUILTIN_TASKS | PAPER_TASKS | USUAL_TASKS
COUNTED_APART: Final = ("no_answer",)
"""Metrics that count answers which could not be read: they are no scores."""
