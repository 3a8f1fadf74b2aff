"""Reports from run folders: examples chosen, page and figures written."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.attacks.decoding import ATTACK as DECODING
from deepalign.attacks.plain import OVER_REFUSAL
from deepalign.attacks.prefill import ATTACK as PREFILL
from deepalign.config_reports import JudgeConfig, ReportConfig
from deepalign.errors import UserError
from deepalign.judges import Judge, get_judge, get_one_judge, make_ready
from deepalign.judges.panel import Panel, members_of
from deepalign.progress import Progress, silent
from deepalign.records import Attempt, Completion, Verdict
from deepalign.report.figures import save_figures
from deepalign.report.page import render_page
from deepalign.runs import RunFolder, clear_disk_errors, write_atomically
from deepalign.workflows.judge_accounts import accounted
from deepalign.workflows.judge_files import Exported, check_whole, export_batch, import_batch
from deepalign.workflows.panels import combined, with_texts
from deepalign.workflows.side_by_side import joined
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS, judge_completions
from deepalign.workflows.summary import METRICS, Judgement, read_metrics, summarise, unfinished

_EXAMPLES_PER_CATEGORY = 3


def write_report(run: RunFolder, data: dict[str, Any], *, redact: bool) -> Path:
    """Write a run's `report.html` and its figures."""
    shown = data if redact else with_texts(run, data)
    run.write_text("report.html", render_page([shown], examples(run, data["judge"]), redact=redact))
    figures(run.path / "figures", [data])
    return run / "report.html"


def write_section(
    run: RunFolder, found: dict[str, Any], models: Sequence[str], judge: str, *, redact: bool
) -> dict[str, Any]:
    """Metrics and report of a run that is no audit; the caller holds its folder."""
    manifest = run.manifest
    known = manifest["environment"]
    data = {
        "schema_version": 1,
        "model": ", ".join(models),
        "judge": judge,
        **found,
        "run_card": {
            "settings": {name: value for name, value in manifest["config"].items() if value not in (None, "")},
            **{name: known[name] for name in ("hardware", "versions", "commit", "started")},
        },
    }
    run.write_json(METRICS, data)
    run.write_text("report.html", render_page([data], [], redact=redact))
    figures(run / "figures", [data])
    return data


def figures(folder: Path, data: list[dict[str, Any]]) -> None:
    """Write the figures as SVG and PNG; where matplotlib is missing the page alone must do."""
    folder.mkdir(exist_ok=True)
    try:
        save_figures(data, folder)
    except UserError:
        # The page already says which command brings the figures; those of an earlier report stay.
        with contextlib.suppress(OSError):
            folder.rmdir()


def examples(run: RunFolder, judge_name: str) -> list[dict[str, Any]]:
    """A few prefilled completions for each category, at different depths; the page redacts them."""
    attempts = [attempt for attempt in run.stream(ATTEMPTS, Attempt) if attempt.attack == PREFILL]
    verdicts = {one.key: one for one in run.stream(f"verdicts.{judge_name}.jsonl", Verdict) if one.attack == PREFILL}
    depths = list(dict.fromkeys(len(attempt.prefill_ids) for attempt in attempts))
    wanted = {depths[i] for i in (0, len(depths) // 2, -1)} if depths else set()
    shown: dict[str, dict[int, Attempt]] = {}
    for attempt in attempts:
        k = len(attempt.prefill_ids)
        here = shown.setdefault(attempt.category, {})
        if k in wanted and k not in here and len(here) < _EXAMPLES_PER_CATEGORY and attempt.key in verdicts:
            here[k] = attempt
    chosen = [(k, attempt) for here in shown.values() for k, attempt in here.items()]
    keys = {attempt.key for _, attempt in chosen}
    written = {one.key: one.text for one in run.stream(COMPLETIONS, Completion) if one.key in keys}
    return [
        {
            "category": attempt.category,
            "prompt": attempt.messages[-1].content,
            "k": k,
            "variant": attempt.variant,
            "prefill_text": attempt.prefill_text,
            "completion": written[attempt.key],
            "status": verdicts[attempt.key].status,
            "outcome": verdicts[attempt.key].outcome,
        }
        for k, attempt in chosen
        if attempt.key in written
    ]


def export_run(config: JudgeConfig) -> Exported:
    """Write the requests of a judge on an endpoint to a batch file; the run stays as it is.

    Raises:
        UserError: The folder is no finished run, the judge asks no server, or nothing is missing.
    """
    assert config.batch_export is not None
    read_metrics(config.run)
    return export_batch(RunFolder(config.run), get_judge(config.judge), config.batch_export)


def judge_run(config: JudgeConfig, progress: Progress = silent) -> dict[str, Any]:
    """Judge a run's completions with another judge, or a newer version; metrics and report are made anew.

    Raises:
        UserError: The folder is no run, or the judge is unknown.
    """
    judge = get_judge(config.judge)
    run = RunFolder(config.run)
    run.manifest  # noqa: B018 - raises where the folder is no run, before it is locked
    if not (run / METRICS).exists():
        raise UserError(unfinished(config.run))
    make_ready(judge, device=config.device, dtype=config.dtype)
    with run.writing():
        if config.batch_import is not None:
            import_batch(run, judge, config.batch_import)
        if not isinstance(judge, Panel):
            # A panel's members keep what they said, or one would be paid again while another is still missing.
            _start_over_where_finished(run, judge)
        return judge_and_report(run, judge, redact=not config.show_completions, progress=progress)


def _start_over_where_finished(run: RunFolder, judge: Judge) -> None:
    """Let go of a judge's verdicts when they are whole: fewer are an interrupted judging, which goes on."""
    name = f"verdicts.{judge.name}.jsonl"
    judged = {verdict.key for verdict in run.stream(name, Verdict)}
    if all(completion.key in judged for completion in run.stream(COMPLETIONS, Completion)):
        (run / name).unlink(missing_ok=True)


def judge_and_report(run: RunFolder, judge: Judge, *, redact: bool, progress: Progress = silent) -> dict[str, Any]:
    """The last steps of every audit: completions -> verdicts -> metrics -> report."""
    found = judge_all(run, judge, progress=progress)
    data = summarise(run, judge, found)
    write_report(run, data, redact=redact)
    return data


def judge_all(run: RunFolder, judge: Judge, *, progress: Progress = silent) -> Judgement:
    """Completions -> verdicts, those that are missing."""
    attempts = run.records(ATTEMPTS, Attempt)
    by_judge: dict[str, list[Verdict]] = {}
    for member in members_of(judge):
        by_judge[member.name] = _judged(run, member, attempts, progress)
    if isinstance(judge, Panel):
        by_judge[judge.name] = _majority(run, judge, by_judge)
    verdicts = by_judge[judge.name]
    swept = [attempt for attempt in attempts if attempt.attack == DECODING]
    scored = verdicts
    if swept:
        scorer = get_one_judge(run.manifest["config"]["decoding_scorer"], "--decoding-scorer")
        if scorer.name != judge.name:
            scored = by_judge.get(scorer.name) or _judged(run, scorer, swept, progress)
    refusing, teller = verdicts, judge
    asked = [attempt for attempt in attempts if attempt.attack == OVER_REFUSAL]
    if asked and not getattr(judge, "tells_refusals", True):
        # A judge of harm finds nothing in a benign answer, which is no refusal.
        teller = get_judge("refusal")
        refusing = _judged(run, teller, asked, progress)
    return Judgement(
        attempts=attempts,
        verdicts=verdicts,
        scored=scored,
        refusing=refusing,
        teller=teller,
        by_judge=by_judge if isinstance(judge, Panel) else None,
    )


def _majority(run: RunFolder, panel: Panel, by_judge: dict[str, list[Verdict]]) -> list[Verdict]:
    """What the majority says, written anew: it costs nothing."""
    verdicts = combined(panel, by_judge)
    run.note(judges={panel.name: panel.version})
    run.write_records(f"verdicts.{panel.name}.jsonl", verdicts)
    return verdicts


def _judged(run: RunFolder, judge: Judge, attempts: list[Attempt], progress: Progress) -> list[Verdict]:
    """A judge's verdicts on attempts; those of another version of it are let go, or a rate would mix two rules."""
    version = str(getattr(judge, "version", ""))
    if run.manifest.get("judges", {}).get(judge.name, version) != version:
        (run / f"verdicts.{judge.name}.jsonl").unlink(missing_ok=True)
    run.note(judges={judge.name: version})
    with accounted(run, judge, progress) as watched:
        verdicts = judge_completions(run, judge, attempts, progress=watched)
    check_whole(run, judge, len(verdicts), attempts)
    return verdicts


def report_runs(config: ReportConfig) -> Path:
    """Write one run's report anew, or one page that compares several.

    Raises:
        UserError: A folder is no finished run, or the page cannot be written.
    """
    if not config.runs:
        raise UserError("give at least one run folder")
    found = joined([(folder, read_metrics(folder)) for folder in config.runs])
    data, alone = [metrics for _, metrics in found], len(config.runs) == 1
    output = config.output or config.runs[0] / ("report.html" if alone else "comparison.html")
    shown = examples(RunFolder(found[0][0]), data[0]["judge"]) if len(data) == 1 else []
    if alone and config.show_completions:
        data = [with_texts(RunFolder(config.runs[0]), data[0])]
    with clear_disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, render_page(data, shown, redact=not config.show_completions))
        if config.figures:
            figures(output.parent / ("figures" if alone else "comparison-figures"), data)
    return output
