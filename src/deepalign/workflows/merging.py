"""Shards of one audit become the run that a single process would have left: checked, joined, judged and reported.

What is checked: that they are all there, once each, finished, and of the same settings, models and versions. Records
are copied line by line; only their keys are held.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.config_reports import MergeConfig
from deepalign.endpoints.spending import Spending
from deepalign.engines.found import same_greedy
from deepalign.errors import UserError
from deepalign.judges import Judge, get_judge, get_one_judge, make_ready
from deepalign.judges.panel import members_of
from deepalign.progress import Progress, silent
from deepalign.runs import MANIFEST, RunFolder
from deepalign.shards import Shard, whole_folder
from deepalign.workflows.answers import tell_answers
from deepalign.workflows.audit_result import AuditResult
from deepalign.workflows.joining import Part, join_records
from deepalign.workflows.judge_accounts import NOTED
from deepalign.workflows.reporting import judge_and_report
from deepalign.workflows.sharding import ORDER, Order, count_lines
from deepalign.workflows.steps import COMPLETIONS
from deepalign.workflows.summary import FINETUNING

_OF_A_SHARD = (
    "schema_version",
    "config",
    "environment",
    "shard",
    "seconds",
    "judges",
    NOTED,
    "answers",
    "answer_counts",
)
_MEASURED_ALIKE = ("onset_openings", "kl_dtype", "num_prompts", "not_run", "first_ids")
_SHOWN_CHARS = 60


def merge_shards(config: MergeConfig, progress: Progress = silent) -> AuditResult:
    """Join the shards of an audit into one run, judge what is unjudged, and write its metrics and report.

    Raises:
        UserError: A shard is missing, doubled, unfinished or of another audit; or the output is another run.
    """
    parts = _read(config.shards)
    _check_complete(parts)
    _check_alike(parts)
    for part in parts:
        _check_finished(part)
    run = RunFolder(config.output or _named_by(parts))
    settings = {name: value for name, value in parts[0].manifest["config"].items() if name != "shard"}
    judge, scorer = get_judge(settings["judge"]), get_one_judge(settings["decoding_scorer"], "--decoding-scorer")
    asked = (*members_of(judge), scorer)
    with run.writing():
        if (run / MANIFEST).exists() and "merged" not in run.manifest:
            raise UserError(f"{run.path} holds a run that was not merged from shards; choose another --output")
        run.claim(settings, _facts(parts))
        order = Order.of(json.loads((parts[0].run / ORDER).read_text(encoding="utf-8")))
        join_records(run, parts, order, {one.name: str(getattr(one, "version", "")) for one in asked}, progress)
        if (parts[0].run / FINETUNING).exists():
            shutil.copytree(parts[0].run / FINETUNING, run / FINETUNING, dirs_exist_ok=True)
        run.note(environment=_environment(parts), **_facts(parts))
        _note_spending(run, parts)
        _make_ready(run, asked, settings)
        data = judge_and_report(run, judge, redact=not config.show_completions, progress=progress)
    return AuditResult(run=run.path, metrics=data)


def _read(folders: Sequence[Path]) -> list[Part]:
    """The shards, in order.

    Raises:
        UserError: There are none, or one is no shard.
    """
    if not folders:
        raise UserError("give the run folders of the shards to merge")
    parts = []
    for folder in folders:
        run = RunFolder(folder)
        manifest = run.manifest
        told = manifest.get("shard")
        if not isinstance(told, dict):
            raise UserError(f"{folder} is a run of its own and no shard; leave it out (audit --shard 1/4 makes shards)")
        parts.append(Part(run=run, shard=Shard(index=told["index"], count=told["count"]), manifest=manifest))
    return sorted(parts, key=lambda part: part.shard.index)


def _check_complete(parts: Sequence[Part]) -> None:
    """Refuse shards that were split in other ways, come twice, or are not all there."""
    known: dict[int, Part] = {}
    for part in parts:
        rival = known.setdefault(part.shard.index, part)
        if part.shard.count != parts[0].shard.count:
            told = " and ".join(f"{one.run.path} is shard {one.shard}" for one in (parts[0], part))
            raise UserError(f"{told}; merge shards that were split alike")
        if rival is not part:
            raise UserError(f"shard {part.shard} is given twice, {rival.run.path} and {part.run.path}; leave one out")
    missing = [shard for shard in parts[0].shard.all() if shard.index not in known]
    if missing:
        whole = whole_folder(parts[0].run.path)
        where = f" (it would be {missing[0].folder(whole)})" if whole else ""
        raise UserError(
            f"{len(missing)} of {parts[0].shard.count} shards are missing: {_some([str(shard) for shard in missing])}"
            f"{where}; give them too, or run the same audit with --shard {missing[0]}"
        )


def _check_finished(part: Part) -> None:
    """Refuse a shard that is still at work, or that lost lines since it was finished."""
    finished = part.told.get("finished")
    again = "run its audit again, which does only what is missing"
    if not isinstance(finished, dict) or not (part.run / ORDER).exists():
        raise UserError(f"{part.run.path} (shard {part.shard}) is not finished; {again}")
    for name, lines in finished.items():
        path = part.run / name
        there = count_lines(path) if path.exists() else 0
        if there != lines:
            raise UserError(
                f"{path} (shard {part.shard}) holds {there} whole lines and not the {lines} that it was finished with; "
                f"{again}"
            )


def _check_alike(parts: Sequence[Part]) -> None:
    """Refuse shards of different settings, models or versions, naming what differs."""
    first = parts[0]
    for other in parts[1:]:
        ours, others = _servers(first), _servers(other)
        if ours and others and same_greedy(ours[0]["greedy"], others[0]["greedy"]) == 0:
            told = f"{first.run.path} ({ours[0]['url']}) and of {other.run.path} ({others[0]['url']})"
            raise UserError(
                f"the servers of {told} answer the same tokens in other ways: they hold other weights; "
                "run one of the two again in a new folder"
            )
        for what, mine, theirs in (
            ("setting ", _settings(first), _settings(other)),
            ("", _models(first), _models(other)),
            ("version of ", _versions(first), _versions(other)),
            ("", _measured(first), _measured(other)),
        ):
            for name in [*mine, *(name for name in theirs if name not in mine)]:
                if mine.get(name) != theirs.get(name):
                    raise UserError(
                        f"the shards differ in {what}{name}: {_short(mine.get(name))} in {first.run.path}, "
                        f"{_short(theirs.get(name))} in {other.run.path}; merge shards of one audit, or run the "
                        "odd one again in a new folder"
                    )


def _servers(part: Part) -> list[dict[str, Any]]:
    """The servers that a shard asked, as its trial found them; none where it generated itself."""
    servers: list[dict[str, Any]] = (part.manifest.get("engine") or {}).get("servers", [])
    return servers


def _settings(part: Part) -> dict[str, Any]:
    return {name: value for name, value in part.manifest["config"].items() if name != "shard"}


def _models(part: Part) -> dict[str, Any]:
    """The models' cards without what may differ from machine to machine."""
    return {
        f"{role}.{name}": value
        for role, card in part.manifest["models"].items()
        for name, value in (card or {}).items()
        if name not in ("device", "source")
    }


def _versions(part: Part) -> dict[str, Any]:
    known = part.manifest["environment"]
    versions = {name: version for name, version in known["versions"].items() if name != "python"}
    return {**versions, "deepalign's commit": known["commit"]}


def _measured(part: Part) -> dict[str, Any]:
    """What each shard found for itself, from the same prompts, and which has to be the same."""
    manifest = part.manifest
    facts = {name: manifest[name] for name in _MEASURED_ALIKE if name in manifest}
    direction = manifest.get("abliteration", {})
    return facts | {f"abliteration.{name}": direction[name] for name in ("layer", "position") if name in direction}


def _named_by(parts: Sequence[Part]) -> Path:
    """The whole run's folder, where the shards have the names that they were given."""
    wholes = {whole_folder(part.run.path) for part in parts}
    whole = wholes.pop()
    if wholes or whole is None:
        raise UserError("the shards' folders do not say where the whole run belongs; give --output DIR")
    return whole


def _facts(parts: Sequence[Part]) -> dict[str, Any]:
    """Manifest of the whole run, from those of its shards."""
    counts = [part.manifest.get("answer_counts", {"given": 0}) for part in parts]
    sampled = [count for count in counts if "source" in count]
    totals = {"given": sum(count["given"] for count in counts)}
    if sampled:
        totals |= {name: sum(count[name] for count in sampled) for name in ("sampled", "failed")}
        totals |= {"source": sampled[0]["source"]}
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, value in part.manifest.get("seconds", {}).items():
            seconds[stage] = round(seconds.get(stage, 0.0) + value, 1)
    return {
        **{name: value for name, value in parts[0].manifest.items() if name not in _OF_A_SHARD},
        "answers": tell_answers(totals),
        **_engine(parts),
        "seconds": seconds,
        "merged": [
            {
                "shard": str(part.shard),
                "folder": str(part.run.path),
                **{name: part.manifest["environment"][name] for name in ("started", "hardware")},
                "seconds": part.manifest.get("seconds", {}),
            }
            for part in parts
        ],
    }


def _note_spending(run: RunFolder, parts: Sequence[Part]) -> None:
    """What judging cost in the shards; a merge that judges the rest adds its own, and one that is repeated does not."""
    if NOTED in run.manifest:
        return
    noted = [part.manifest.get(NOTED, {}) for part in parts]
    totals = {}
    for judge in dict.fromkeys(name for one in noted for name in one):
        spent = [one[judge] for one in noted if judge in one]
        counted = [
            name for name in (*(field.name for field in dataclasses.fields(Spending)), "cost") if name in spent[0]
        ]
        known = {name: [one[name] for one in spent if one.get(name) is not None] for name in counted}
        totals[judge] = {**spent[0], **{name: sum(values) if values else None for name, values in known.items()}}
    if totals:
        run.note(**{NOTED: totals})


def _make_ready(run: RunFolder, judges: Sequence[Judge], settings: dict[str, Any]) -> None:
    """Let judges with models of their own fetch them, where something is left to be judged."""
    for judge in judges:
        path = run / f"verdicts.{judge.name}.jsonl"
        if count_lines(path) < count_lines(run / COMPLETIONS):
            make_ready(judge, device=settings["device"], dtype=settings["dtype"])


def _engine(parts: Sequence[Part]) -> dict[str, Any]:
    """The trial of the servers, with those of all shards."""
    servers = {server["url"]: server for part in parts for server in _servers(part)}
    if not servers:
        return {}
    asked = [part.manifest["engine"] for part in parts if _servers(part)]
    told = list(dict.fromkeys(line for engine in asked for line in engine["told"]))
    return {"engine": {**asked[0], "told": told, "servers": list(servers.values())}}


def _environment(parts: Sequence[Part]) -> dict[str, Any]:
    known = [part.manifest["environment"] for part in parts]
    return {
        **known[0],
        "hardware": "; ".join(dict.fromkeys(one["hardware"] for one in known)),
        "started": min(one["started"] for one in known),
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
