"""Programs of a model's: what passes, what fails, and what the limits stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepalign.utility.code_runner import run_code


def test_a_program_passes_only_by_reaching_its_end() -> None:
    assert run_code("def f():\n    return 1\nassert f() == 1") == ""
    assert run_code("assert 1 == 2, 'not equal'") == "AssertionError: not equal"
    assert run_code("import sys\nsys.exit(0)") == "left early with status 0"
    assert run_code("def f(:").startswith("SyntaxError")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("x = 'a' * (3 << 30)", "MemoryError"),
        ("with open('new.txt', 'w') as out:\n    out.write('x' * 100)", "File too large"),
        ("import torch", "ModuleNotFoundError"),
        ("import os\nassert not os.environ.get('HOME')\nraise ValueError('no home')", "ValueError: no home"),
    ],
)
def test_the_limits_hold(program: str, told: str) -> None:
    assert told in run_code(program)


def test_an_endless_program_is_stopped() -> None:
    assert run_code("while True:\n    pass", seconds=1) in ("no end within 1 seconds", "left early with status -24",
                                                             "left early with status -9")  # fmt: skip


def test_nothing_outside_its_folder_is_written(tmp_path: Path) -> None:
    target = tmp_path / "escaped.txt"
    assert run_code(f"with open({str(target)!r}, 'w') as out:\n    out.write('x' * 10)\n    out.flush()") != ""
    assert not target.exists() or target.stat().st_size == 0
