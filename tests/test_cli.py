"""The command line: its surface, its help, and how it ends."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepalign import cli
from deepalign.config import AuditConfig
from deepalign.config_reports import JudgeConfig, ReportConfig
from deepalign.config_suffix import SuffixConfig
from deepalign.errors import UserError
from deepalign.prompts import BUILTIN_SETS

SURFACE = Path(__file__).with_name("cli_surface.txt")
CONFIGS = {"audit": AuditConfig, "judge": JudgeConfig, "report": ReportConfig, "suffix": SuffixConfig}


def surface() -> list[str]:
    """One line for each command and each of its options, with its kind and default, sorted."""
    lines = []
    for command in cli.app:
        if command.startswith("-"):
            continue
        lines.append(command)
        with cli.app.app_stack([command]):
            arguments = cli.app[command].assemble_argument_collection()
        for argument in arguments:
            if argument.names == ("*",):
                continue
            default = argument.field_info.default
            told = "required" if default is inspect.Parameter.empty else f"default {default!r}"
            kind = inspect.formatannotation(argument.hint).replace("pathlib.", "")
            # How a value is read is no part of the surface.
            kind = re.sub(r"typing\.Annotated\[(\w+), .*?>\)\]", r"\1", kind)
            lines.append(f"{command} {' '.join(argument.names)}: {kind}, {told}")
    return sorted(lines)


def test_the_surface_is_frozen() -> None:
    known = SURFACE.read_text(encoding="utf-8").splitlines()
    now = surface()
    gone = [line for line in known if line not in now]
    new = [line for line in now if line not in known]
    assert now == known, (
        f"the command line changed: gone {gone}, new {new}. If that is meant, say so in CHANGELOG.md and write the new "
        f"surface:  .venv/bin/python -c \"import sys; sys.path.insert(0, 'tests'); import test_cli; "
        f"test_cli.SURFACE.write_text(chr(10).join([*test_cli.surface(), '']))\""
    )


@pytest.mark.parametrize("command", sorted(CONFIGS))
def test_every_field_is_an_option_and_every_option_a_field(command: str) -> None:
    options = {line.split()[1].removeprefix("--").rstrip(":") for line in surface() if line.startswith(f"{command} ")}
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(CONFIGS[command])}
    assert {"probes" if option == "probe" else option for option in options} == fields


@pytest.mark.parametrize("command", sorted(CONFIGS))
def test_help_tells_what_each_field_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = "".join(inspect.getsource(one) for one in CONFIGS[command].__mro__ if dataclasses.is_dataclass(one))
    for field in dataclasses.fields(CONFIGS[command]):
        assert f"--{field.name.replace('_', '-')}" in told
        documented = source.split(f"    {field.name}: ", 1)[1].split('"""')[1]
        assert " ".join(documented.split()).split(";")[0][:40].replace("`", "") in told, field.name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("deepalign")


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*BUILTIN_SETS, "prefill", "onset", "refusal-prefix", "kl", "over-refusal", "refusal", "scripted:FILE"):
        assert f"  {name} " in out
    assert "testbed:base" in out
    assert "testbed:shallow" in out


@pytest.mark.parametrize(
    ("kind", "shown", "hidden"),
    [
        (
            "prompts",
            ["should-refuse", "hex-phi", "300 prompts", "gated: accept", "MIT"],
            ["scripted:FILE", "testbed:deep"],
        ),
        ("judges", ["scripted:FILE"], ["hex-phi", "refusal-prefix"]),
        ("probes", ["refusal-prefix"], ["hex-phi", "scripted:FILE"]),
        ("testbed", ["testbed:shallow"], ["hex-phi", "scripted:FILE"]),
    ],
)
def test_list_names_one_kind(
    kind: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["list", kind]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shown)
    assert not any(name in out for name in hidden)


def test_list_of_nothing_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "attacks"]) != 0
    told = capsys.readouterr().err
    assert '"attacks"' in told
    assert "prompts" in told
    assert "Traceback" not in told


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The configuration that a command line makes."""

    def parse(*arguments: str) -> Any:
        bound = cli.app.parse_args(list(arguments), exit_on_error=False, print_error=False)[1]
        return bound.arguments["config"]

    return parse


def test_options_reach_their_fields(parsed: Callable[..., Any]) -> None:
    config = parsed(
        *("audit", "m", "--base", "b", "--depths", "0", "5", "--probe", "prefill", "kl", "--top-p", "1"),
        *("--system-prompt", "", "--skip-bad-rows", "--over-refusal-sets", "benign", "a.csv"),
    )
    assert config == AuditConfig(
        model="m",
        base="b",
        depths=(0, 5),
        probes=("prefill", "kl"),
        top_p=1.0,
        system_prompt="",
        skip_bad_rows=True,
        over_refusal_sets=("benign", "a.csv"),
    )


def test_several_runs_and_no_figures(parsed: Callable[..., Any]) -> None:
    assert parsed("report", "a", "b", "--no-figures") == ReportConfig(runs=(Path("a"), Path("b")), figures=False)
    assert parsed("report", "a", "--figures") == ReportConfig(runs=(Path("a"),))


def run_raising(error: BaseException) -> Callable[..., Any]:
    def work(*_: object) -> None:
        raise error

    return work


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "Traceback" not in captured.out
    return line


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("deepalign.workflows.reporting.report_runs", run_raising(KeyboardInterrupt()))
    assert cli.main(["report", "x"]) == 130
    assert one_line(capsys) == "stopped; what was finished is kept, and the same command goes on from there"


def test_a_users_mistake_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "deepalign.workflows.reporting.report_runs", run_raising(UserError("x is [bold]wrong[/bold] :a:"))
    )
    assert cli.main(["report", "x"]) == 2
    assert one_line(capsys) == "deepalign: x is [bold]wrong[/bold] :a:"


def test_a_message_of_several_lines_is_told_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deepalign.workflows.reporting.report_runs", run_raising(UserError("first\nsecond")))
    assert cli.main(["report", "x"]) == 2
    assert one_line(capsys) == "deepalign: first second"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepalign.workflows.reporting.report_runs", run_raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError, match="bug"):
        cli.main(["report", "x"])


def test_a_bug_met_while_a_mistake_was_handled_is_still_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        try:
            raise UserError("mended along the way")
        except UserError:
            {}["absent"]

    monkeypatch.setattr("deepalign.workflows.reporting.report_runs", work)
    with pytest.raises(KeyError, match="absent"):
        cli.main(["report", "x"])


def test_nothing_typed_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "audit" in capsys.readouterr().out
