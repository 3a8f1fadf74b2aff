"""Judging by a batch file: the requests that a judge would send are written out, and their results read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepalign.endpoints.batch_files import read_results, write_batch
from deepalign.errors import UserError
from deepalign.judges import Judge
from deepalign.judges.rubric import RubricJudge
from deepalign.records import Attempt, Completion, JudgeInput, Verdict
from deepalign.runs import RunFolder
from deepalign.workflows.judging import shown
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export wrote."""

    files: list[Path]
    num_requests: int


def export_batch(run: RunFolder, judge: Judge, path: Path) -> Exported:
    """Write the requests whose replies are missing, each once.

    Raises:
        UserError: The judge asks no server, or nothing is missing.
    """
    rubric = _on_endpoint(judge, "--batch-export")
    requests = rubric.missing(list(_texts(run, rubric)))
    if not requests:
        raise UserError(f"no request is missing for judge {judge.name}; judge without --batch-export")
    return Exported(files=write_batch(path, requests), num_requests=len(requests))


def import_batch(run: RunFolder, judge: Judge, path: Path) -> None:
    """Give a judge the results of a batch; from now on it sends nothing, and what has no result stays open.

    Raises:
        UserError: The file holds nothing that this judge asked about this run.
    """
    rubric = _on_endpoint(judge, "--batch-import")
    asked = set(rubric.keys(list(_texts(run, rubric, all_of_them=True))))
    taken = 0
    for result in read_results(path, rubric.client.servers[0]):
        if result.key in asked:
            taken += rubric.take(result)
    if not taken:
        raise UserError(
            f"{path} holds no reply to a request of judge {judge.name} for {run.path}; "
            "give the judge as it was given to --batch-export"
        )
    rubric.sends = False


def check_whole(run: RunFolder, judge: Judge, num_verdicts: int, attempts: list[Attempt]) -> None:
    """Stop before metrics are made of a part of the verdicts."""
    keys = {attempt.key for attempt in attempts}
    total = sum(completion.key in keys for completion in run.stream(COMPLETIONS, Completion))
    if isinstance(judge, RubricJudge) and not judge.sends and num_verdicts < total:
        raise UserError(
            f"{num_verdicts} of {total} completions are judged and kept; the others have no reply yet: "
            "--batch-export writes their requests, or judge without --batch-import to send them"
        )


def _on_endpoint(judge: Judge, option: str) -> RubricJudge:
    if not isinstance(judge, RubricJudge):
        raise UserError(f"judge {judge.name} asks no server; {option} is for rubric:MODEL@URL and its like")
    return judge


def _texts(run: RunFolder, judge: Judge, *, all_of_them: bool = False) -> Iterator[JudgeInput]:
    """The texts of completions that have no verdict of this judge's version yet, or of all."""
    by_key = {attempt.key: attempt for attempt in run.records(ATTEMPTS, Attempt)}
    version = run.manifest.get("judges", {}).get(judge.name, "")
    current = not all_of_them and version == getattr(judge, "version", "")
    done = {verdict.key for verdict in run.stream(f"verdicts.{judge.name}.jsonl", Verdict)} if current else set()
    for completion in run.stream(COMPLETIONS, Completion):
        if completion.key in by_key and completion.key not in done:
            yield from shown(by_key[completion.key], completion).texts
