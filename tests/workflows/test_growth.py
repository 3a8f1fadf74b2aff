"""Many prompts cost more time and no more memory, and the last completion no more than the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepalign.batching import Continuation
from deepalign.chat import conversation
from deepalign.models import from_objects
from deepalign.records import Attempt, Completion, JudgeInput, Ruling
from deepalign.runs import RunFolder
from deepalign.workflows import steps
from deepalign.workflows.reporting import examples
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS, complete, completed, judge_completions

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_growth.py"
NUM_PROMPTS = 2000
MOST_MIB = 48.0
"""Far below what the run writes and holds in Python objects, far above what an allocator keeps back."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads a process's memory from /proc")
def test_an_interrupted_sharded_resumed_audit_of_many_prompts(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--json", "--prompts", str(NUM_PROMPTS), "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "model")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["asr"] is not None for row in found["metrics"]] == [True, True]
    for name, each in (("completions", 2), ("verdicts.refusal", 2), ("onset", 1)):
        lines = (tmp_path / "run" / f"{name}.jsonl").read_bytes().splitlines()
        assert len(lines) == len(set(lines)) == each * NUM_PROMPTS
    assert found["mib_highest"] < found["mib_early"] + MOST_MIB, found["looks"]
    for stage in ("prefill", "refusal onset"):
        assert found[stage]["ms_late"] < 2.5 * found[stage]["ms_early"], found["looks"]


class Refuser:
    name = "refuser"

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        return [Ruling(status="refused", outcome="refused_at_once") for _ in items]


def attempt(number: int) -> Attempt:
    return Attempt(
        prompt_id=f"p{number}",
        attack="prefill",
        variant="k=0",
        sample=0,
        model="target",
        messages=conversation("?", None),
    )


@pytest.fixture
def long_run(tmp_path: Path) -> tuple[RunFolder, list[Attempt], int]:
    """A run with all but the last of its completions, each of 500 large ids; and the memory that they take."""
    run, attempts = RunFolder(tmp_path), [attempt(number) for number in range(200)]
    run.write_records(ATTEMPTS, attempts)
    ids = tuple(range(100_000, 100_500))
    run.write_records(
        COMPLETIONS,
        (
            Completion(
                prompt_id=one.prompt_id,
                attack=one.attack,
                variant=one.variant,
                sample=0,
                status="ok",
                text="no " * 500,
                token_ids=ids,
                char_ends=tuple(range(1000, 1500)),
            )
            for one in attempts[:-1]
        ),
    )
    return run, attempts, peak(lambda: run.records(COMPLETIONS, Completion))


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", ["resuming", "looking", "judging", "showing"])
def test_no_step_holds_the_completions_of_a_run(
    step: str,
    long_run: tuple[RunFolder, list[Attempt], int],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, attempts, together = long_run
    loaded = from_objects(tiny_llama(), tiny_tokenizer, name="target")
    work = {
        "resuming": lambda: complete(run, loaded, attempts, stage="prefill", max_batch=8),
        "looking": lambda: completed(run, attempts),
        "judging": lambda: judge_completions(run, Refuser(), attempts),
        "showing": lambda: examples(run, "refuser"),
    }[step]
    if step == "showing":
        judge_completions(run, Refuser(), attempts)
    monkeypatch.setattr(steps, "batch_of", lambda _: 8)
    assert together > 4 * 2**20
    assert peak(work) < together / 3


def test_attempts_are_rendered_in_parts(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at a time as fill some batches, in order, each once, whatever was done before."""
    sizes: list[int] = []

    class Engine:
        def complete(self, jobs: Sequence[Any], **_: Any) -> Iterator[Continuation]:
            sizes.append(len(jobs))
            for index in range(len(jobs)):
                yield Continuation(index=index, status="ok", finish="stop")

    monkeypatch.setattr(steps, "_MOST_JOBS", 10)
    loaded = from_objects(tiny_llama(), tiny_tokenizer, name="target")
    run, attempts = RunFolder(tmp_path), [attempt(number) for number in range(25)]
    run.write_records(COMPLETIONS, [])
    monkeypatch.setattr(steps, "in_process", lambda *_: Engine())
    complete(run, loaded, attempts[:3], stage="prefill", max_batch=0)
    complete(run, loaded, attempts, stage="prefill", max_batch=0)
    assert sizes == [3, 10, 10, 2]
    assert [one.key for one in run.records(COMPLETIONS, Completion)] == [one.key for one in attempts]
