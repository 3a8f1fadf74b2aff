"""deepalign: measure how many tokens deep a language model's safety alignment goes.

    import deepalign
    result = deepalign.audit(deepalign.AuditConfig(model="testbed:shallow", base="testbed:base"))
    result.metrics["depth"]["tokens_at_10pct"]

Names are loaded when first used, so that `import deepalign` and `deepalign --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepalign.config import AuditConfig, JudgeConfig, ReportConfig
    from deepalign.errors import UserError
    from deepalign.models import LoadedModel, load_model
    from deepalign.records import Attempt, Completion, Message, Prompt, Sampling, Verdict
    from deepalign.workflows.audit import AuditResult, audit
    from deepalign.workflows.reporting import judge_run, report_runs

_HOMES = {
    "Attempt": "records",
    "AuditConfig": "config",
    "AuditResult": "workflows.audit",
    "Completion": "records",
    "JudgeConfig": "config",
    "LoadedModel": "models",
    "Message": "records",
    "Prompt": "records",
    "ReportConfig": "config",
    "Sampling": "records",
    "UserError": "errors",
    "Verdict": "records",
    "audit": "workflows.audit",
    "judge_run": "workflows.reporting",
    "load_model": "models",
    "report_runs": "workflows.reporting",
}

__all__ = [
    "Attempt",
    "AuditConfig",
    "AuditResult",
    "Completion",
    "JudgeConfig",
    "LoadedModel",
    "Message",
    "Prompt",
    "ReportConfig",
    "Sampling",
    "UserError",
    "Verdict",
    "audit",
    "judge_run",
    "load_model",
    "report_runs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepalign' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepalign.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
