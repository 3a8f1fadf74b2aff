"""deepalign: measure how many tokens deep a language model's safety alignment goes, make it deeper, and keep it.

    import deepalign
    result = deepalign.audit(deepalign.AuditConfig(model="testbed:shallow", base="testbed:base"))
    result.metrics["depth"]["tokens_at_10pct"]

Names are loaded when first used, so that `import deepalign` and `deepalign --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepalign.attacks.suffix import Suffix
    from deepalign.config import AuditConfig
    from deepalign.config_attacks import GridConfig
    from deepalign.config_diagnosis import DiagnoseConfig, DynamicsConfig
    from deepalign.config_reports import JudgeConfig, MergeConfig, ReportConfig
    from deepalign.config_suffix import SuffixConfig
    from deepalign.config_tuning import DeepenConfig, FinetuneConfig
    from deepalign.config_utility import UtilityConfig, WinrateConfig
    from deepalign.errors import UserError
    from deepalign.losses import TokenStrength, constrained_token_loss
    from deepalign.models import LoadedModel, load_model
    from deepalign.records import Attempt, Completion, Message, Prompt, Sampling, Verdict
    from deepalign.runs import RunResult
    from deepalign.training.arguments import ConstrainedSFTConfig
    from deepalign.training.trainer import ConstrainedSFTTrainer
    from deepalign.workflows.audit import audit
    from deepalign.workflows.audit_result import AuditResult
    from deepalign.workflows.before_after import TuningResult
    from deepalign.workflows.deepen import deepen
    from deepalign.workflows.diagnose import diagnose
    from deepalign.workflows.dynamics import dynamics
    from deepalign.workflows.finetune import finetune
    from deepalign.workflows.grid import GridResult, grid
    from deepalign.workflows.merging import merge_shards
    from deepalign.workflows.reporting import judge_run, report_runs
    from deepalign.workflows.suffix import SuffixResult, suffix_search
    from deepalign.workflows.utility import measure_utility
    from deepalign.workflows.winrate import measure_winrate

_HOMES = {
    "Attempt": "records",
    "AuditConfig": "config",
    "AuditResult": "workflows.audit_result",
    "Completion": "records",
    "ConstrainedSFTConfig": "training.arguments",
    "ConstrainedSFTTrainer": "training.trainer",
    "DeepenConfig": "config_tuning",
    "DiagnoseConfig": "config_diagnosis",
    "DynamicsConfig": "config_diagnosis",
    "FinetuneConfig": "config_tuning",
    "GridConfig": "config_attacks",
    "GridResult": "workflows.grid",
    "JudgeConfig": "config_reports",
    "LoadedModel": "models",
    "MergeConfig": "config_reports",
    "Message": "records",
    "Prompt": "records",
    "ReportConfig": "config_reports",
    "RunResult": "runs",
    "Sampling": "records",
    "Suffix": "attacks.suffix",
    "SuffixConfig": "config_suffix",
    "SuffixResult": "workflows.suffix",
    "TokenStrength": "losses",
    "TuningResult": "workflows.before_after",
    "UserError": "errors",
    "UtilityConfig": "config_utility",
    "WinrateConfig": "config_utility",
    "Verdict": "records",
    "audit": "workflows.audit",
    "constrained_token_loss": "losses",
    "deepen": "workflows.deepen",
    "diagnose": "workflows.diagnose",
    "dynamics": "workflows.dynamics",
    "finetune": "workflows.finetune",
    "grid": "workflows.grid",
    "judge_run": "workflows.reporting",
    "load_model": "models",
    "measure_utility": "workflows.utility",
    "measure_winrate": "workflows.winrate",
    "merge_shards": "workflows.merging",
    "report_runs": "workflows.reporting",
    "suffix_search": "workflows.suffix",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepalign' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepalign.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
