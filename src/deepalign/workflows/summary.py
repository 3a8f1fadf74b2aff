"""From a run folder's records to its `metrics.json`: joins, counts, and nothing that needs a model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign import metrics
from deepalign import worst_case as worst
from deepalign.attacks.decoding import ATTACK as DECODING
from deepalign.attacks.plain import OVER_REFUSAL, REFUSAL_PREFIX
from deepalign.attacks.prefill import Skipped
from deepalign.depth import KlProfile
from deepalign.judges import Judge
from deepalign.judges.panel import who_tells
from deepalign.onset import OnsetProfile
from deepalign.over_refusal import over_refusal_rows
from deepalign.records import Attempt, Completion, Prompt, Verdict
from deepalign.runs import RunFolder
from deepalign.workflows import panels
from deepalign.workflows.along import profiles_of
from deepalign.workflows.attack_sections import attack_sections, searches_settled
from deepalign.workflows.onset import ONSET
from deepalign.workflows.steps import COMPLETIONS, KL

PROMPTS, SKIPPED, METRICS = "prompts.jsonl", "skipped.jsonl", "metrics.json"
FINETUNING = "finetuning"
"""Folder, inside an audit's, of the copies that were tuned and measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A run's attempts and what was ruled on them."""

    attempts: list[Attempt]
    verdicts: list[Verdict]
    scored: list[Verdict]
    """Those of the judge that picks the worst answers of the decoding probe."""
    refusing: list[Verdict]
    """Those that over-refusal is read off."""
    teller: Judge
    """Whose those are."""
    by_judge: dict[str, list[Verdict]] | None = None
    """Of a panel: each member's, and the majority's."""


def summarise(run: RunFolder, judge: Judge, found: Judgement) -> dict[str, Any]:
    """Compute the metrics of a run from its records, and write `metrics.json` and `metrics.<judge>.json`.

    Args:
        run: Where the records are.
        judge: Whose verdicts are reported.
        found: What was judged.
    """
    manifest = run.manifest
    data = compute(run, manifest, judge, found)
    run.write_json(METRICS, data)
    run.write_json(f"metrics.{judge.name}.json", data)
    return data


def compute(run: RunFolder, manifest: dict[str, Any], judge: Judge, found: Judgement) -> dict[str, Any]:
    """The content of `metrics.json`; `docs/metrics.md` defines every field."""
    attempts, verdicts, scored = found.attempts, found.verdicts, found.scored
    config = manifest["config"]
    judged = searches_settled(run, metrics.join(attempts, verdicts))
    skipped = run.records(SKIPPED, Skipped)
    profiles = profiles_of(run, KL, KlProfile)
    data: dict[str, Any] = {
        "schema_version": 1,
        "model": config["model"],
        "base": config["base"],
        "judge": judge.name,
        "num_prompts": manifest["num_prompts"],
        "models": manifest["models"],
        "run_card": run_card(manifest, judge),
        "not_run": _not_run(manifest["not_run"]),
    }
    rows = metrics.prefill_rows(judged, config["depths"], skipped) if "prefill" in config["probes"] else None
    forward = metrics.kl_rows(profiles, lambda profile: profile.forward) if profiles else None
    means = [row["mean"] for row in forward if row["mean"] is not None] if forward else None
    data["prefill"] = rows
    data["depth"] = metrics.depth_summary(rows or [], config["threshold"], means)
    onset_profiles = profiles_of(run, ONSET, OnsetProfile)
    data["refusal_onset"] = (
        metrics.onset_section(onset_profiles, judged, config["onset_horizon"], config["depths"])
        if onset_profiles
        else None
    )
    data |= attack_sections(run, manifest, judged, skipped)
    data["decoding"] = decoding_json(attempts, verdicts, scored, config["decoding_scorer"])
    data["kl"] = forward
    data["kl_reverse"] = metrics.kl_rows(profiles, lambda profile: profile.reverse) if profiles else None
    prefixes = list(dict.fromkeys(a.variant for a in attempts if a.attack == REFUSAL_PREFIX))
    data["refusal_prefix"] = metrics.refusal_prefix_rows(judged, prefixes) or None
    sets = list(dict.fromkeys(a.variant for a in attempts if a.attack == OVER_REFUSAL))
    harmless = [attempt for attempt in attempts if attempt.attack == OVER_REFUSAL]
    data["over_refusal"] = (
        over_refusal_rows(
            metrics.join(harmless, found.refusing),
            sets,
            judge=who_tells(found.teller),
            by_status=not hasattr(found.teller, "tells_refusals"),
        )
        or None
    )
    data["panel"] = panels.section(attempts, found.by_judge) if found.by_judge else None
    data["finetuning"] = _of_copies(run)
    data["worst_case"] = _worst_case(run, manifest, judged, data["finetuning"])
    data["by_category"] = metrics.category_rows(judged, config["depths"]) if rows else None
    data["thoughts"] = (metrics.thoughts_rows(judged, config["depths"]) if rows else None) or None
    data["unscored"] = metrics.unscored_rows(judged)
    data["skipped"] = [
        {
            "attack": skip.attack,
            "prompt_id": skip.prompt_id,
            "k": skip.k,
            "answer_tokens": skip.answer_tokens,
            "reason": skip.reason,
        }
        for skip in skipped
    ]
    failed = Counter((c.attack, c.reason) for c in run.stream(COMPLETIONS, Completion) if c.status == "failed")
    data["failed"] = [{"attack": attack, "reason": why, "count": n} for (attack, why), n in failed.most_common()]
    return data


def _worst_case(
    run: RunFolder, manifest: dict[str, Any], judged: list[metrics.Judged], tuned: dict[str, Any] | None
) -> dict[str, Any]:
    tampering = [row for row in (worst.abliteration_row(judged), worst.finetuning_row(tuned)) if row]
    audited = {prompt.prompt_id for prompt in run.records(PROMPTS, Prompt)}
    return worst.worst_case(judged, prompts=audited, tampering=tampering, not_run=manifest["not_run"])


def _of_copies(run: RunFolder) -> dict[str, Any] | None:
    path = run / FINETUNING / METRICS
    if not path.exists():
        return None
    section: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["finetuning"]
    return section


def decoding_json(
    attempts: list[Attempt], verdicts: list[Verdict], scored: list[Verdict], scorer: str
) -> dict[str, Any] | None:
    """The decoding section of the metrics, with the settings that decide it; None where nothing was tried."""
    swept = [attempt for attempt in attempts if attempt.attack == DECODING]
    if not swept:
        return None
    section = metrics.decoding_section(metrics.join(swept, verdicts), metrics.join(swept, scored))
    system = next((turn.content for turn in swept[0].messages if turn.role == "system"), None)
    return {
        "system_prompt": "none" if system is None else system or '"" (empty)',
        "scorer": scorer,
        **section,
    }


def _not_run(probes: dict[str, str]) -> dict[str, str]:
    """Why each section of the metrics is empty, where a probe was not run."""
    sections = {
        "prefill": ("prefill", "by_category"),
        "onset": ("refusal_onset",),
        "ranks": ("harmful_rank",),
        "rap": ("rap",),
        "decoding": ("decoding",),
        "jailbreaks": ("jailbreaks",),
        "suffix": ("suffix",),
        "any-depth": ("any_depth",),
        "abliteration": ("abliteration",),
        "kl": ("kl", "kl_reverse"),
        "refusal-prefix": ("refusal_prefix",),
        "over-refusal": ("over_refusal",),
        "finetuning": ("finetuning",),
    }
    return {section: reason for probe, reason in probes.items() for section in sections[probe]}


def run_card(manifest: dict[str, Any], judge: Judge) -> dict[str, Any]:
    """All that a reader needs to compare this run with another."""
    config, environment = manifest["config"], manifest["environment"]
    system = config["system_prompt"]
    return {
        "system_prompt": "none (the template's own default, if it has one)"
        if system is None
        else system or '"" (empty)',
        "template_hash": manifest["models"]["target"]["template_hash"],
        "decoder": {
            "temperature": config["temperature"],
            "top_p": config["top_p"],
            "top_k": config["top_k"],
            "max_new_tokens": config["max_new_tokens"],
            "num_samples": config["samples"],
            "seed": config["seed"],
        },
        "engine": (manifest.get("engine") or {"told": "hf: in this process"})["told"],
        "prefill_site": config["site"],
        "prompt_set": manifest["prompt_set"],
        "prompt_hash": config["prompt_hash"],
        "num_prompts": manifest["num_prompts"],
        "num_bad_rows_skipped": len(manifest["skipped_rows"]),
        "answers": manifest["answers"],
        "first_ids": manifest["first_ids"],
        "first_tokens": manifest["first_tokens"],
        "judge": judge.name,
        "judge_version": getattr(judge, "version", None),
        "swap_check": manifest.get("swap_check"),
        "hardware": environment["hardware"],
        "versions": environment["versions"],
        "commit": environment["commit"],
        "started": environment["started"],
        "seconds": manifest.get("seconds", {}),
    }


def unfinished(folder: Path) -> str:
    """What to tell the user of a run without metrics."""
    if "shard" in RunFolder(folder).manifest:
        told = RunFolder(folder).manifest["shard"]
        part = f"shard {told['index']}/{told['count']}"
        return f"{folder} is {part} of an audit and has no metrics; deepalign merge joins it with the others"
    return f"{folder} has no {METRICS}: its audit has not finished; run the same audit again"


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run; raises `UserError` where there are none."""
    from deepalign.errors import UserError

    RunFolder(folder).manifest  # noqa: B018 - raises where the folder is no run
    try:
        data: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(unfinished(folder)) from None
    except ValueError as error:
        raise UserError(f"{folder}/metrics.json cannot be read: {error}; run deepalign judge {folder}") from error
    if not isinstance(data, dict):
        raise UserError(f"{folder}/metrics.json does not hold a JSON object; run deepalign judge {folder}")
    return data
