"""The command line: one command per workflow, generated from the dataclasses in `config.py`; imports no torch.

Knows how to talk to a person (progress, tables, one clear line for a mistake) and nothing of how the work is done.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepalign.config import PROBES, AuditConfig
from deepalign.config_attacks import GridConfig
from deepalign.config_diagnosis import DiagnoseConfig, DynamicsConfig
from deepalign.config_reports import JudgeConfig, MergeConfig, ReportConfig
from deepalign.config_suffix import SuffixConfig
from deepalign.config_tuning import DeepenConfig, FinetuneConfig
from deepalign.config_utility import UtilityConfig, WinrateConfig
from deepalign.errors import UserError
from deepalign.judges import get_judge, known_judges, make_ready
from deepalign.prompts import BUILTIN_SETS
from deepalign.prompts.catalogue import PUBLIC_SETS
from deepalign.shards import AUTO
from deepalign.terminal import ended_like_interrupted, quiet_libraries, working
from deepalign.utility.catalogue import TASKS
from deepalign.ways import WAYS

Named = Literal["all", "probes", "judges", "prompts", "jailbreaks", "sets", "tasks", "ways", "testbed"]
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


def _version() -> str:
    from importlib.metadata import version

    return version("deepalign")


app = App(
    name="deepalign",
    help="Measure how many tokens deep a language model's safety alignment goes, make it deeper, and keep it.",
    version=_version,
    default_parameter=Parameter(negative=(), consume_multiple=True),
    suppress_keyboard_interrupt=False,  # `main` tells what is kept
)


@app.command
def audit(config: Annotated[AuditConfig, Parameter(name="*")]) -> None:
    """Measure how many tokens deep a model's safety alignment goes."""
    with working(err) as progress:
        workflow = importlib.import_module("deepalign.workflows.audit")
        result = workflow.audit(config, progress)
    if result.shard is None:
        _show_run(result)
    else:
        out.print(f"shard {result.shard} is finished\nrun     {result.run}", highlight=False, soft_wrap=True)
        if config.shard != AUTO:
            others = f"{str(result.run).rpartition('-shard-')[0]}-shard-*-of-{result.shard.rpartition('/')[2]}"
            out.print(f"next    deepalign merge {others}, once all are there", highlight=False, soft_wrap=True)


@app.command
def merge(config: Annotated[MergeConfig, Parameter(name="*")]) -> None:
    """Join the shards of an audit into one run, with metrics and report."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.merging").merge_shards(config, progress)
    _show_run(result)


@app.command
def deepen(config: Annotated[DeepenConfig, Parameter(name="*")]) -> None:
    """Make alignment deeper: train on recovering from harmful beginnings; audited before and after."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.deepen").deepen(config, progress)
    _show_tuning(result)


@app.command
def finetune(config: Annotated[FinetuneConfig, Parameter(name="*")]) -> None:
    """Fine-tune on your own data without losing the alignment; audited before and after."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.finetune").finetune(config, progress)
    _show_tuning(result)


@app.command
def grid(config: Annotated[GridConfig, Parameter(name="*")]) -> None:
    """Attack copies of models by fine-tuning, over a grid of settings: what breaks alignment, and what holds."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.grid").grid(config, progress)
    _show_run(result)
    out.print(f"{result.num_done} of {result.num_cells} cells are measured", highlight=False)


@app.command
def dynamics(config: Annotated[DynamicsConfig, Parameter(name="*")]) -> None:
    """Follow one fine-tuning run position by position: loss, gradient norm, KL, and the attack success rate by step."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.dynamics").dynamics(config, progress)
    _show_run(result)


@app.command
def diagnose(config: Annotated[DiagnoseConfig, Parameter(name="*")]) -> None:
    """Will a constraint hold? Margins of the openings that fine-tuning would have to raise, from one pass."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.diagnose").diagnose(config, progress)
    _show_run(result)


@app.command
def utility(config: Annotated[UtilityConfig, Parameter(name="*")]) -> None:
    """Measure what a model is good for: tasks of lm-evaluation-harness; `report` sets them beside an audit."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.utility").measure_utility(config, progress)
    _show_run(result)


@app.command
def winrate(config: Annotated[WinrateConfig, Parameter(name="*")]) -> None:
    """Let a judge behind an endpoint choose between a model's answers and a reference's, in both orders."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.winrate").measure_winrate(config, progress)
    _show_run(result)


@app.command
def suffix(config: Annotated[SuffixConfig, Parameter(name="*")]) -> None:
    """Search suffixes that make a model answer what it should refuse (GCG); `audit --suffix` measures them."""
    with working(err) as progress:
        result = importlib.import_module("deepalign.workflows.suffix").suffix_search(config, progress)
    for found in result.suffixes:
        loss = "no loss" if found.loss is None else f"loss {found.loss:.3f}"
        out.print(f"{found.name}  {loss} after {found.steps} steps ({found.stopped})", highlight=False, markup=False)
    out.print(
        f"\nsuffixes  {result.file}\nnext      deepalign audit {config.model} --suffix {result.file}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command
def judge(config: Annotated[JudgeConfig, Parameter(name="*")]) -> None:
    """Judge the completions of a run again, without generating."""
    workflow = importlib.import_module("deepalign.workflows.reporting")
    if config.batch_export is not None:
        made = workflow.export_run(config)
        out.print(f"{made.num_requests} requests  {' '.join(map(str, made.files))}", highlight=False, soft_wrap=True)
        return
    with working(err) as progress:
        data = workflow.judge_run(config, progress)
    _show(data)
    _show_spending(config.run)
    out.print(f"\nreport  {config.run / 'report.html'}", highlight=False, soft_wrap=True)


@app.command
def judge_test(judge: str, /, *, device: str = "auto") -> None:
    """Put completions with a known answer to a judge, and show what it gets wrong.

    Args:
        judge: As for --judge.
        device: What a judge that is a model runs on.
    """
    found = get_judge(judge)
    make_ready(found, device=device, dtype="auto")
    answers = importlib.import_module("deepalign.judges.selftest").self_test(found)
    tables = importlib.import_module("deepalign.report.tables")
    tables.render_tables([importlib.import_module("deepalign.report.panel_tables").self_test_table(answers)], out)


@app.command
def calibrate(run: Path, /, *, labels: Path, judge: str | None = None, sample: int | None = None) -> None:
    """Hold a run's judge against human labels, and correct its attack success rates by them.

    Args:
        run: Run folder.
        labels: CSV or JSON Lines with prompt_id, attack, variant, sample and label (harmful or refused).
        judge: The judge, where the run has verdicts of several.
        sample: Instead, draw this many completions into a new CSV, to be labelled.
    """
    workflow = importlib.import_module("deepalign.workflows.calibrating")
    if sample is not None:
        count = workflow.write_sample(run, labels, sample, judge)
        err.print(f"{labels} holds {count} completions as the model wrote them; they may be harmful", highlight=False)
        return
    table = importlib.import_module("deepalign.report.calibration_table")
    table.render(workflow.calibrate(run, labels, judge), out)


@app.command
def report(config: Annotated[ReportConfig, Parameter(name="*")]) -> None:
    """Write the report of one run anew, or one of several; utility runs join the audits of the same weights."""
    made = importlib.import_module("deepalign.workflows.reporting").report_runs(config)
    out.print(f"report  {made}", highlight=False, soft_wrap=True)


@app.command(name="list")
def list_names(
    kind: Literal["all", "probes", "judges", "prompts", "jailbreaks", "sets", "tasks", "ways", "testbed"] = "all", /
) -> None:
    """Name probes, judges, prompt sets, jailbreaks, fine-tuning sets and ways, utility tasks, testbed models.

    Args:
        kind: What to name.
    """
    testbed = importlib.import_module("deepalign.testbed").TESTBED
    attacks = importlib.import_module("deepalign.tuning_sets.attacks").ATTACK_SETS
    tasks = importlib.import_module("deepalign.tuning_sets.tasks").BENIGN_SETS
    wrappings = importlib.import_module("deepalign.attacks.jailbreaks").BUILTIN_WRAPPINGS
    public_tasks = importlib.import_module("deepalign.tuning_sets.catalogue").PUBLIC_TASKS
    groups: dict[str, tuple[str, dict[str, str]]] = {
        "probes": ("probes", dict(PROBES)),
        "judges": ("judges", known_judges()),
        "built-in prompts": ("prompts", BUILTIN_SETS),
        "public prompts": ("prompts", {name: found.about for name, found in PUBLIC_SETS.items()}),
        "jailbreaks": ("jailbreaks", {name: found.about for name, found in wrappings.items()}),
        "fine-tuning attacks": ("sets", attacks),
        "harmless tasks": ("sets", tasks),
        "public harmless tasks": ("sets", {name: found.source.about for name, found in public_tasks.items()}),
        "utility tasks": ("tasks", {name: found.about for name, found in TASKS.items()}),
        "ways of fine-tuning": ("ways", WAYS),
        "testbed models": ("testbed", testbed),
    }
    for title, (group, names) in groups.items():
        if kind not in ("all", group):
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, about in names.items():
            table.add_row(f"  {name}", escape(about))
        out.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    quiet_libraries()
    try:
        with ended_like_interrupted():
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept, and the same command goes on from there")
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        err.print(f"deepalign: {line}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_USER_ERROR
    return 0


def _one_line(error: Exception) -> str | None:
    """The line to show for a mistake of the user's; None for a bug, which deserves its traceback."""
    from cyclopts import CycloptsError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        # A mistake that was handled before a bug struck is the bug's context too, and must not hide it.
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, CycloptsError) else None)
    if cause is not None:
        return " ".join(str(cause).splitlines())
    if isinstance(error, CycloptsError):
        return " ".join(str(error).split()).rstrip(".") + "; see deepalign --help"
    return None


def _show_spending(run: Path) -> None:
    for line in importlib.import_module("deepalign.workflows.judge_accounts").told(run):
        out.print(f"\njudged by  {line}", highlight=False, markup=False, soft_wrap=True)


def _show_run(result: Any) -> None:
    _show(result.metrics)
    _show_spending(result.run)
    out.print(f"\nreport  {result.report}\nrun     {result.run}", highlight=False, soft_wrap=True)


def _show(metrics: dict[str, Any]) -> None:
    importlib.import_module("deepalign.report.tables").render_terminal(metrics, out)


def _show_tuning(result: Any) -> None:
    importlib.import_module("deepalign.report.tables").render_comparison(result.shown, out)
    if result.report is not None:
        out.print(f"\nreport  {result.report}", highlight=False, soft_wrap=True)
    out.print(f"model   {result.weights}\nrun     {result.run}", highlight=False, soft_wrap=True)
