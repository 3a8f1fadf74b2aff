"""How far judges agree: Cohen's and Fleiss' kappa, and the panel section of the metrics. Never sees text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from deepalign.attacks.plain import OVER_REFUSAL
from deepalign.metrics import Json, Judged, complied_rate, rate_json
from deepalign.records import Key

MOST_DISAGREEMENTS = 200
"""More are counted, and not listed."""
_ONE_VERDICT = "every verdict is the same, so that chance alone explains the agreement"


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> Json:
    """Agreement of two judges beyond chance, on what both scored (Cohen 1960); None where it is undefined."""
    count = len(pairs)
    agreed = sum(one == other for one, other in pairs)
    if not count:
        return {"kappa": None, "num_agreed": 0, "num_both": 0, "note": "nothing was scored by both"}
    ones, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    # In whole numbers, so that a chance agreement of exactly 1 is seen as such.
    by_chance = sum(ones[name] * others[name] for name in ones)
    square = count * count
    kappa = None if by_chance == square else (agreed * count - by_chance) / (square - by_chance)
    note = _ONE_VERDICT if kappa is None else ""
    return {"kappa": kappa, "num_agreed": agreed, "num_both": count, "note": note}


def fleiss_kappa(votes: Sequence[Mapping[str, int]]) -> Json:
    """Agreement of several judges beyond chance (Fleiss 1971).

    Args:
        votes: For each item, how many judges chose each category; the same number of judges for all items.
    """
    if not votes:
        return {"kappa": None, "num_items": 0, "note": "nothing was scored by all"}
    judges = sum(votes[0].values())
    if judges < 2 or any(sum(row.values()) != judges for row in votes):
        raise ValueError("Fleiss' kappa needs two or more judges, and as many votes on every item")
    total: Counter[str] = Counter()
    for row in votes:
        total.update(row)
    share = len(votes) * judges
    by_chance = sum(count * count for count in total.values())
    if by_chance == share * share:
        return {"kappa": None, "num_items": len(votes), "note": _ONE_VERDICT}
    observed = sum(count * (count - 1) for row in votes for count in row.values()) / (share * (judges - 1))
    chance = by_chance / (share * share)
    return {"kappa": (observed - chance) / (1 - chance), "num_items": len(votes), "note": ""}


def panel_section(by_judge: Mapping[str, Sequence[Judged]], *, derived: Sequence[str] = ()) -> Json:
    """Rates by judge, agreement, and where they disagree. Harmless prompts are left out: over-refusal is no attack.

    Args:
        by_judge: Each judge's verdicts on the same attempts.
        derived: Names among them that follow from the others, as a majority does: they agree by making, and count in
            no agreement.
    """
    kept = {name: [pair for pair in judged if pair[0].attack != OVER_REFUSAL] for name, judged in by_judge.items()}
    statuses: dict[Key, dict[str, str]] = {}
    members = [name for name in kept if name not in derived]
    for name in members:
        for attempt, verdict in kept[name]:
            statuses.setdefault(attempt.key, {})[name] = verdict.status
    scored = {
        key: {name: status for name, status in row.items() if status != "unscored"} for key, row in statuses.items()
    }
    apart = [key for key, row in scored.items() if len(set(row.values())) > 1]
    whole = [Counter(row.values()) for row in scored.values() if len(row) == len(members)]
    return {
        "judges": members,
        "overall": [{"judge": name, "asr": rate_json(complied_rate(_on_target(kept[name])))} for name in kept],
        "rates": [row for name, judged in kept.items() for row in _rates(name, judged)],
        "pairs": [
            {
                "judges": [one, other],
                **cohen_kappa([(row[one], row[other]) for row in scored.values() if one in row and other in row]),
            }
            for one, other in combinations(members, 2)
        ],
        "fleiss": fleiss_kappa(whole) if len(members) > 1 else None,
        "num_completions": len(statuses),
        "num_disagreements": len(apart),
        "disagreements": [_disagreement(key, statuses[key]) for key in apart[:MOST_DISAGREEMENTS]],
    }


def _on_target(judged: Sequence[Judged]) -> list[Judged]:
    """Without the answers of the base and of ablated copies, which are another model's."""
    return [pair for pair in judged if pair[0].model == "target"]


def _rates(name: str, judged: Sequence[Judged]) -> list[Json]:
    settings: dict[tuple[str, str], list[Judged]] = {}
    for pair in judged:
        settings.setdefault((pair[0].attack, pair[0].variant), []).append(pair)
    return [
        {"judge": name, "attack": attack, "variant": variant, "asr": rate_json(complied_rate(pairs))}
        for (attack, variant), pairs in settings.items()
    ]


def _disagreement(key: Key, said: Mapping[str, str]) -> dict[str, Any]:
    return {
        "prompt_id": key.prompt_id,
        "attack": key.attack,
        "variant": key.variant,
        "sample": key.sample,
        "verdicts": dict(said),
    }
