"""A judge that reads its verdicts from a table: for tests, and for labels that people gave.

Owns the lookup by response text. Knows no rule: a response without a row stays unscored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from deepalign.errors import UserError
from deepalign.records import JudgeInput, Outcome, Ruling, Status

_FIELDS = ("response", "status", "outcome", "reason", "refusal_char")
_DEFAULT_OUTCOMES: dict[Status, Outcome] = {
    "refused": "refused_at_once",
    "complied": "complied",
    "unscored": "unscored",
}
_OUTCOMES: dict[Status, tuple[Outcome, ...]] = {
    "refused": ("refused_at_once", "recovered"),
    "complied": ("complied",),
    "unscored": ("unscored",),
}


class ScriptedJudge:
    """Returns the ruling written down for each response."""

    name: str = "scripted"

    def __init__(self, rulings: Mapping[str, Ruling]) -> None:
        """Keep the table.

        Args:
            rulings: Ruling by exact response text.
        """
        self._rulings = dict(rulings)
        # The labels are the judge's rule: changed ones must not be mixed with verdicts from before.
        content = repr(sorted(self._rulings.items(), key=lambda row: row[0])).encode("utf-8", "surrogatepass")
        self.version = f"scripted-{hashlib.sha256(content).hexdigest()[:12]}"

    @classmethod
    def from_file(cls, path: Path) -> ScriptedJudge:
        """Read the table from JSON Lines rows {"response", "status", and optionally the other fields of a ruling}."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{str(path)!r}, scripted verdicts: not readable ({error}); give JSON Lines") from error
        rulings: dict[str, Ruling] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    response, ruling = _parse_row(line)
                    if rulings.setdefault(response, ruling) != ruling:
                        raise ValueError("this response has another verdict on an earlier line; keep one")
                except ValueError as error:
                    raise UserError(f"scripted verdicts {str(path)!r}, line {number}: {error}") from error
        return cls(rulings)

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Look each response up; same order and length."""
        missing = Ruling(status="unscored", outcome="unscored", reason="no scripted verdict")
        return [self._rulings.get(item.response, missing) for item in items]


def _parse_row(line: str) -> tuple[str, Ruling]:
    """One row; raises `ValueError` saying what is wrong with it."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
    response = row.get("response")
    if not isinstance(response, str):
        raise ValueError(f'"response" is {response!r}; give the response text')
    return response, _parse_ruling(row, len(response))


def _parse_ruling(row: Mapping[str, Any], num_chars: int) -> Ruling:
    given = row.get("status")
    if given not in get_args(Status):
        raise ValueError(f'"status" is {given!r}; give one of {", ".join(get_args(Status))}')
    status = cast(Status, given)
    outcome = row.get("outcome") or _DEFAULT_OUTCOMES[status]
    if outcome not in _OUTCOMES[status]:
        raise ValueError(f'"outcome" is {outcome!r}; a {status} response has {" or ".join(_OUTCOMES[status])}')
    reason = row.get("reason") or ""
    if not isinstance(reason, str):
        raise ValueError(f'"reason" is {reason!r}; give text')
    position = row.get("refusal_char")
    if position is not None and (type(position) is not int or not 0 <= position < num_chars):
        raise ValueError(f'"refusal_char" is {position!r}; give a whole number inside the response, or leave it out')
    return Ruling(status=status, outcome=outcome, reason=reason, refusal_char=position)
