"""Two answers to one request before a judge, in both orders: what is asked, how a reply is read, and what it counts.

A request's score is the mean over both orders, so that a judge who always takes the first answer moves nothing; how
often the first was taken is reported. A reply without a verdict is unscored, and so is its request.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from deepalign.metrics import rate_json
from deepalign.statistics import mean_interval, rate

Order = Literal["model first", "reference first"]
ORDERS: tuple[Order, ...] = ("model first", "reference first")
Choice = Literal["model", "reference", "tie", "unscored"]
_PLACE = re.compile(r"\{\{(fence|instruction|first|second)\}\}")
_VERDICT = re.compile(r"^\W*better\W*:\W*(A|B|tie)\W*$", re.IGNORECASE | re.MULTILINE)
_VALUES = {"model": 1.0, "tie": 0.5, "reference": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """What the judge chose, for one request in one order."""

    prompt_id: str
    order: Order
    choice: Choice
    reason: str = ""
    """Why it is unscored."""
    raw: str = ""
    """What the judge wrote."""
    called: bool = True
    """False where no reply came: worth asking again."""


def question(prompt: str, model: str, reference: str, order: Order) -> str:
    """What the judge is asked; no text can end its place, since the marks' code stands in none of them."""
    first, second = (model, reference) if order == "model first" else (reference, model)
    for number in itertools.count():
        fence = hashlib.sha256(f"{number}\0{prompt}".encode("utf-8", "replace")).hexdigest()[:12]
        if not any(fence in text for text in (prompt, model, reference)):
            break
    values = {"fence": fence, "instruction": prompt, "first": first, "second": second}
    text = resources.files("deepalign.utility").joinpath("pairwise.txt").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: values[place[1]], text).encode("utf-8", "replace").decode()


def read(raw: str, order: Order) -> Choice:
    """The choice that a reply ends in; the last verdict counts, and a reply without one is unscored."""
    found = _VERDICT.findall(raw)
    if not found:
        return "unscored"
    letter = found[-1].upper()
    if letter == "TIE":
        return "tie"
    return "model" if (letter == "A") == (order == "model first") else "reference"


def win_rate(preferences: Sequence[Preference], prompt_ids: Sequence[str]) -> dict[str, Any]:
    """Win rate over requests with its interval, wins, ties and losses, agreement of the orders, and position bias."""
    by_prompt: dict[str, dict[Order, Choice]] = {prompt_id: {} for prompt_id in prompt_ids}
    for one in preferences:
        if one.prompt_id in by_prompt and one.choice != "unscored":
            by_prompt[one.prompt_id][one.order] = one.choice
    both = {name: found for name, found in by_prompt.items() if len(found) == len(ORDERS)}
    values = [sum(_VALUES[choice] for choice in found.values()) / len(ORDERS) for found in both.values()]
    interval = mean_interval(values)
    decided = [
        (name, (choice == "model") == (order == "model first"))
        for name, found in both.items()
        for order, choice in found.items()
        if choice != "tie"
    ]
    return {
        "rate": sum(values) / len(values) if values else None,
        "ci95": list(interval) if interval else None,
        "numerator": None,
        "denominator": len(values),
        "num_unscored": len(by_prompt) - len(values),
        "num_wins": sum(value > 0.5 for value in values),
        "num_ties": sum(value == 0.5 for value in values),
        "num_losses": sum(value < 0.5 for value in values),
        "same_in_both_orders": rate_json(rate([(name, len(set(found.values())) == 1) for name, found in both.items()])),
        "first_chosen": rate_json(rate(decided)),
    }
