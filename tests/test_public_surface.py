"""What `import deepalign` gives."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import deepalign

FROZEN = {
    "Attempt",
    "AuditConfig",
    "AuditResult",
    "Completion",
    "ConstrainedSFTConfig",
    "ConstrainedSFTTrainer",
    "DeepenConfig",
    "DiagnoseConfig",
    "DynamicsConfig",
    "FinetuneConfig",
    "GridConfig",
    "GridResult",
    "JudgeConfig",
    "LoadedModel",
    "MergeConfig",
    "Message",
    "Prompt",
    "ReportConfig",
    "RunResult",
    "Sampling",
    "Suffix",
    "SuffixConfig",
    "SuffixResult",
    "TokenStrength",
    "TuningResult",
    "UserError",
    "UtilityConfig",
    "Verdict",
    "WinrateConfig",
    "audit",
    "constrained_token_loss",
    "deepen",
    "diagnose",
    "dynamics",
    "finetune",
    "grid",
    "judge_run",
    "load_model",
    "measure_utility",
    "measure_winrate",
    "merge_shards",
    "report_runs",
    "suffix_search",
}


def test_the_surface_is_frozen() -> None:
    assert set(deepalign.__all__) == FROZEN, "a public name changed: say so in CHANGELOG.md, then here"
    assert deepalign.__all__ == sorted(deepalign.__all__)
    assert dir(deepalign) == sorted(FROZEN)


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_every_name_loads_from_its_home(name: str) -> None:
    found = getattr(deepalign, name)
    assert found.__name__ == name
    home = importlib.import_module(found.__module__)
    assert getattr(home, name) is found
    assert (found.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'adit'"):
        _ = deepalign.adit


def test_a_submodule_still_loads() -> None:
    from deepalign import records

    assert records.Prompt is deepalign.Prompt


def test_the_names_for_type_checkers_are_the_names_at_run_time() -> None:
    module = ast.parse(Path(deepalign.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in module.body if isinstance(node, ast.If)]
    told = {
        (alias.name, statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert told == {(name, f"deepalign.{home}") for name, home in deepalign._HOMES.items()}
    assert set(deepalign._HOMES) == FROZEN
