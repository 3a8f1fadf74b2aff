"""Guard models as judges of harm: a table of formats, each a small file, run by one runner.

On the command line: `NAME`, `NAME:SIZE`, `NAME:ID_OR_FOLDER[@REVISION]`, and after `::` what the format needs besides.
Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from deepalign.judges.guards.formats import Guard
    from deepalign.judges.guards.runner import GuardJudge

_ALSO = "::"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the table."""

    says: str
    """One line for lists."""
    module: str
    """In this room."""
    format: str
    """Class that is the format."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    also: str = ""
    """What "::" and more text gives: "base" (the model below an adapter), or the name of a setting of the format."""


GUARDS: dict[str, Entry] = {
    "qwen3guard": Entry(
        says="Qwen3Guard-Gen (0.6b, 4b, 8b; open): harm, and whether a text refuses; Controversial is not harm",
        module="qwen3guard",
        format="Qwen3Guard",
    ),
    "qwen3guard-strict": Entry(
        says="the same, with Controversial as harm",
        module="qwen3guard",
        format="Qwen3Guard",
        settings={"strict": True},
    ),
    "harmbench": Entry(
        says="HarmBench's Llama-2-13b classifier (open): is it an instance of what was asked for? First 512 tokens",
        module="harmbench",
        format="HarmBench",
        settings={"family": "llama"},
    ),
    "harmbench-mistral": Entry(
        says="HarmBench's Mistral-7b validation classifier (open); first 512 tokens",
        module="harmbench",
        format="HarmBench",
        settings={"family": "mistral"},
    ),
    "strongreject-ft": Entry(
        says="StrongREJECT fine-tuned (adapter open, its base google/gemma-2b gated): help from 0 to 1; ::BASE",
        module="strongreject",
        format="StrongReject",
        also="base",
    ),
    "llama-guard-3": Entry(
        says="Llama Guard 3 (8b, 1b; gated): safe or unsafe, with hazards",
        module="llama_guard",
        format="LlamaGuard",
        settings={"version": 3},
    ),
    "llama-guard-4": Entry(
        says="Llama Guard 4 (12b; gated): safe or unsafe, with hazards",
        module="llama_guard",
        format="LlamaGuard",
        settings={"version": 4},
    ),
    "wildguard": Entry(
        says="WildGuard (7b; gated): harm, and whether a text refuses", module="wildguard", format="WildGuard"
    ),
    "shieldgemma": Entry(
        says="ShieldGemma (2b, 9b; gated): four principles, the worst counts",
        module="shieldgemma",
        format="ShieldGemma",
    ),
    "gpt-oss-safeguard": Entry(
        says="gpt-oss-safeguard (20b, 120b; open): reasons about a policy, ours or your own; ::POLICY_FILE",
        module="gpt_oss_safeguard",
        format="GptOssSafeguard",
        also="policy_file",
    ),
}


def guard_judge(name: str, spec: str = "") -> GuardJudge:
    """The judge of that name; its weights are fetched when it is made ready, and loaded with the first text.

    Args:
        name: A key of `GUARDS`.
        spec: Size, hub id with or without @REVISION, or folder; "" for the pinned default; "::" and more after it.

    Raises:
        UserError: There is no such size or folder, or what follows "::" cannot be used.
    """
    from deepalign.errors import UserError
    from deepalign.judges.guards.runner import GuardJudge
    from deepalign.judges.guards.sources import find

    entry = GUARDS[name]
    weights, _, also = spec.partition(_ALSO)
    if also and not entry.also:
        raise UserError(f"judge {name!r} takes nothing after '::', got {also[:200]!r}; leave it out")
    settings = dict(entry.settings)
    if also and entry.also != "base":
        settings[entry.also] = also
    made = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.format)
    guard = cast("Guard", made(**settings))
    base = also if entry.also == "base" else ""
    return GuardJudge(guard, find(name, weights, guard.about.sizes, base=base))
