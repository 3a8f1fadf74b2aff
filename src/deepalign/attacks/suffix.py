"""Prompts with an adversarial suffix: what a search found (GCG, Zou et al. 2023), or a file of suffixes to replay.

A suffix is text that follows the prompt after one space. What is searched on one model and replayed on another is the
transfer attack; the file says which model and template it was found with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from deepalign.attacks import AttackSettings, attempts
from deepalign.errors import UserError
from deepalign.records import Attempt, Prompt, from_dict

ATTACK = "suffix"
SEPARATOR = " "
FILE = "suffixes.jsonl"
"""Of suffixes, in the folder of a search and in that of an audit that tried them."""
Kind = Literal["universal", "per-prompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suffix:
    """One suffix, with where it comes from."""

    name: str
    text: str
    """What follows the prompt and one space."""
    kind: Kind = "universal"
    prompt: str = ""
    """Text of the one prompt that it was searched for; "" for a universal one."""
    ids: tuple[int, ...] = ()
    """Its tokens in the vocabulary of the model that it was searched on."""
    loss: float | None = None
    """Mean cross-entropy of the targets after it, over what it was searched on."""
    losses: tuple[float, ...] = ()
    """The best loss after each step."""
    steps: int | None = None
    stopped: str = ""
    """Why the search ended."""
    num_behaviours: int | None = None
    """Prompts that it was searched on."""
    num_evaluated: int | None = None
    num_drifted: int | None = None
    """Candidates that would not have come back as the same tokens from text."""
    model: str = ""
    fingerprint: str = ""
    template_hash: str = ""
    seed: int | None = None


def with_suffix(text: str, suffix: str) -> str:
    """A prompt followed by a suffix, as the search and every replay write it."""
    return text + SEPARATOR + suffix


def suffix_attempts(
    prompts: Sequence[Prompt], suffixes: Sequence[Suffix], settings: AttackSettings
) -> tuple[Attempt, ...]:
    """Every prompt with every universal suffix, and with those that were searched for it alone."""
    return tuple(
        replace(attempt, asked=prompt.text)
        for prompt in prompts
        for suffix in suffixes
        if suffix.kind == "universal" or suffix.prompt == prompt.text
        for attempt in attempts(
            replace(prompt, text=with_suffix(prompt.text, suffix.text)),
            settings,
            attack=ATTACK,
            variant=suffix.name,
        )
    )


def read_suffixes(path: Path) -> tuple[Suffix, ...]:
    """Suffixes of a file: JSON Lines with at least a `text`, as `deepalign suffix` writes them, or one on each line.

    Raises:
        UserError: No such file, or none in it; a line that is no suffix; a name that stands twice.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--suffix {path} cannot be read ({error}); give a file of suffixes") from error
    # Not splitlines, which also breaks at characters that a suffix may hold.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    as_json = path.suffix.lower() in (".jsonl", ".json")
    found = [
        _from_json(path, number, line) if as_json else Suffix(name=f"line-{number}", text=line.strip())
        for number, line in lines
    ]
    if not found:
        raise UserError(f"--suffix {path} holds no suffix; give one on each line, or what deepalign suffix wrote")
    seen: set[tuple[str, str]] = set()
    for suffix in found:
        if (suffix.name, suffix.prompt) in seen:
            raise UserError(f"--suffix {path}: the name {suffix.name!r} stands twice; give each suffix its own")
        seen.add((suffix.name, suffix.prompt))
    return tuple(found)


def _from_json(path: Path, number: int, line: str) -> Suffix:
    place = f"--suffix {path}, line {number}"
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{place} is not JSON ({error}); mend it, or give a text file with a suffix on each line"
        ) from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{place} has no text; give each suffix as {{"text": ...}}')
    known = {field.name for field in fields(Suffix)}
    values = {name: value for name, value in row.items() if name in known}
    kind = values.get("kind", "universal")
    if kind not in ("universal", "per-prompt") or (kind == "per-prompt" and not values.get("prompt")):
        raise UserError(f'{place}: kind {kind!r} is neither "universal" nor "per-prompt" with its prompt')
    return from_dict(Suffix, {"name": f"line-{number}", **values})
