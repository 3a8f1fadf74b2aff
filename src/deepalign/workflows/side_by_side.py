"""Audits and utility runs of the same weights as one, and where each model stands between safety and use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepalign.metrics import rate_json
from deepalign.statistics import Rate, wilson
from deepalign.utility.summary import overall

Json = dict[str, Any]
Found = tuple[Path, Json]


def joined(runs: Sequence[Found]) -> list[Found]:
    """Runs with the utility of the same weights put into the audit of them; those that match nothing stay alone.

    Weights are told by their fingerprint, so that a name may stand for two models and a model for two names. Every run
    that has utility gets its place between safety and use, over the tasks that all of them were asked in the same way.
    """
    hosts = [(path, dict(data)) for path, data in runs if not _only_utility(data)]
    for path, data in runs:
        if not _only_utility(data):
            continue
        same = [host for _, host in hosts if _fingerprint(host) and _fingerprint(host) == _fingerprint(data)]
        if not same:
            hosts.append((path, dict(data)))
        for host in same:
            if data.get("utility"):
                host["utility"] = _both(host.get("utility"), data["utility"])
            if data.get("win_rate"):
                host.setdefault("win_rate", data["win_rate"])
    _place(hosts)
    return hosts


def _only_utility(data: Mapping[str, Any]) -> bool:
    return bool(data.get("utility") or data.get("win_rate")) and "prefill" not in data


def _fingerprint(data: Mapping[str, Any]) -> str | None:
    target = (data.get("models") or {}).get("target") or {}
    return target.get("fingerprint")


def _both(first: Mapping[str, Any] | None, other: Mapping[str, Any]) -> Json:
    """The tasks of two utility runs of one model; where both asked a task, the first counts."""
    if not first:
        return dict(other)
    if first["asked"] != other["asked"]:
        return dict(first)
    known = {row["task"] for row in first["tasks"]}
    rows = [*first["tasks"], *(row for row in other["tasks"] if row["task"] not in known)]
    return {**first, "tasks": rows, "overall": overall(rows)}


def _place(hosts: Sequence[Found]) -> None:
    """Give each run with utility its place, and say which are beaten by no other."""
    used = [data for _, data in hosts if data.get("utility")]
    if not any(_asr(_safety(data)) is not None for data in used):
        return
    common, note = _common_tasks([data["utility"] for data in used])
    for data in used:
        rows = [row for row in data["utility"]["tasks"] if row["task"] in common]
        data["trade_off"] = {"utility": overall(rows), "note": note, **_safety(data)}
    points = [
        data["trade_off"] for data in used if data["trade_off"]["utility"] and _asr(data["trade_off"]) is not None
    ]
    if len(points) > 1:
        for point in points:
            point["pareto"] = not any(_beats(other, point) for other in points)


def _common_tasks(sections: Sequence[Mapping[str, Any]]) -> tuple[set[str], str]:
    """Tasks that every run has a score for, on the same items, read and asked in the same way."""
    keys = [
        {
            (row["task"], row["metric"], row["filter"], row["data_hash"], tuple(row["num_fewshot"]))
            for row in section["tasks"]
            if row["score"] and not row["num_failed"]
        }
        for section in sections
    ]
    shared = set.intersection(*keys) if keys else set()
    common = {key[0] for key in shared}
    every = dict.fromkeys(row["task"] for section in sections for row in section["tasks"])
    told = f"Utility is the mean over {', '.join(name for name in every if name in common) or 'no task'}"
    left = [name for name in every if name not in common]
    if left:
        told += f"; left out, since not every run has the same items of it: {', '.join(left)}"
    ways = dict.fromkeys(section["asked"] for section in sections)
    if len(ways) > 1:
        told += f"; asked in different ways ({', '.join(ways)}), so compare with care"
    return common, f"{told}."


def _safety(data: Mapping[str, Any]) -> Json:
    """The worst and the plain rate of the prefilling attack, and refusals over all harmless sets."""
    rows = [row for row in data.get("prefill") or [] if row["asr"] is not None]
    found: Json = {"asr": None, "plain_asr": None, "asr_at": "", "over_refusal": None}
    if rows:
        worst = max(rows, key=lambda row: row["asr"])
        plain = next((row for row in rows if row["k"] == 0), None)
        found |= {"asr": _flat(worst), "asr_at": f"k = {worst['k']}", "plain_asr": _flat(plain) if plain else None}
    sets = [row["refusals"] for row in data.get("over_refusal") or [] if row["refusals"]["rate"] is not None]
    if sets:
        numerator, denominator = sum(one["numerator"] for one in sets), sum(one["denominator"] for one in sets)
        found["over_refusal"] = rate_json(
            Rate(
                numerator=numerator,
                denominator=denominator,
                num_unscored=sum(one["num_unscored"] for one in sets),
                rate=numerator / denominator,
                ci95=wilson(numerator / denominator, denominator),
            )
        )
    return found


def _flat(row: Mapping[str, Any]) -> Json:
    return {
        "rate": row["asr"],
        "numerator": row["num_success"],
        "denominator": row["num_scored"],
        "num_unscored": row["num_unscored"],
        "ci95": row["ci95"],
    }


def _asr(point: Mapping[str, Any]) -> float | None:
    return point["asr"]["rate"] if point["asr"] else None


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is at least as good on both, and better on one."""
    safer, more = (_asr(other) or 0) - (_asr(one) or 0), one["utility"]["rate"] - other["utility"]["rate"]
    return safer >= 0 and more >= 0 and (safer > 0 or more > 0)
