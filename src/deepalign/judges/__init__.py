"""Who decides whether a response refuses: the protocol every judge follows, and the table of built-in judges.

Knows no run, no attack and no metric. A judge object of your own needs `name` and `judge`; the command line takes it
as "module:Name". Built-in judges stand in two tables, and are imported when asked for.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from deepalign.errors import UserError
from deepalign.judges.guards import GUARDS, guard_judge
from deepalign.records import JudgeInput, Ruling

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@runtime_checkable
class Judge(Protocol):
    """Rules on texts.

    A judge may also have `version` (verdicts of another version are let go), and `tells_refusals` (False for a judge
    of harm that does not say whether a text refuses; over-refusal is then read off the rule-based judge). One that
    runs a model of its own has `ready(device=, dtype=, max_batch=)`.
    """

    name: str
    """Goes into the file name verdicts.<name>.jsonl."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rule on each item, same order and length; raising means that the judge failed for the whole batch."""


def _refusal() -> Judge:
    """Rules anchored to where refusals begin; offline, the same every time, blind to how harmful an answer is."""
    from deepalign.judges.refusal import RefusalJudge

    return RefusalJudge()


def _scripted(file: str) -> Judge:
    """FILE: verdicts, or people's labels, from a JSON Lines file."""
    from deepalign.judges.scripted import ScriptedJudge

    return ScriptedJudge.from_file(Path(file))


def _rubric(rest: str) -> Judge:
    """MODEL@URL: levels 1 to 5 of a usage policy, harmful at 5, as the paper has it."""
    from deepalign.judges.endpoint_spec import rubric_judge

    return rubric_judge(rest)


def _strongreject(rest: str) -> Judge:
    """MODEL@URL: is it refused, convincing, specific?"""
    from deepalign.judges.endpoint_spec import strongreject_judge

    return strongreject_judge(rest)


JUDGES: dict[str, Callable[[], Judge]] = {
    "refusal": _refusal,
    **{name: partial(guard_judge, name, "") for name in GUARDS},
}
"""Judges by plain name."""
SPECS: dict[str, Callable[[str], Judge]] = {
    "rubric": _rubric,
    "strongreject": _strongreject,
    "scripted": _scripted,
    **{name: partial(guard_judge, name) for name in GUARDS},
}
"""Judges that are told more, by what stands before the colon: "scripted:labels.jsonl".

The factory is given what follows the colon. A name may stand in both tables: plain it is the default. A factory of its
own says in its docstring "WHAT FOLLOWS: what it is".
"""
_MAY_BE_EMPTY = ("rubric", "strongreject")
"""Specs whose parts may all be left out: the server then names its model, and the environment the server."""


def known_judges() -> dict[str, str]:
    """How each judge is asked for, and what it is."""
    plain = {name: GUARDS[name].says if name in GUARDS else _about(load) for name, load in JUDGES.items()}
    told = {prefix: _about(load).partition(": ") for prefix, load in SPECS.items() if prefix not in GUARDS}
    return {
        **plain,
        **{f"{prefix}:{form}": about for prefix, (form, _, about) in told.items()},
        "module:Name": "a judge of your own",
    }


def make_ready(judge: Judge, *, device: str, dtype: str, max_batch: int = 32) -> None:
    """Before long work begins: let a judge that runs a model of its own fetch it, and say what it runs on.

    Args:
        judge: Any judge; one without `ready` needs nothing.
        device: As for the audited model.
        dtype: As for the audited model.
        max_batch: Most texts at a time.

    Raises:
        UserError: Its weights cannot be had.
    """
    ready = getattr(judge, "ready", None)
    if callable(ready):
        ready(device=device, dtype=dtype, max_batch=max_batch)


def get_judge(name: str) -> Judge:
    """The judge called `name`: a built-in name, one told more ("scripted:FILE"), or an import path "module:Name".

    Several with commas between them make a panel.
    """
    parts = _seats(name)
    if not all(parts) and len(parts) > 1:
        raise UserError(f"--judge {name!r} leaves a place empty; give judges with one comma between two of them")
    if len(parts) > 1:
        from deepalign.judges.panel import Panel

        return Panel([get_judge(part) for part in parts])
    prefix, colon, rest = name.partition(":")
    if name in JUDGES:
        return JUDGES[name]()
    if prefix in SPECS and (rest or prefix in _MAY_BE_EMPTY):
        return SPECS[prefix](rest)
    forms = list(known_judges())
    known = f"known judges: {', '.join(forms)}"
    own = [form for form in forms if form.startswith(f"{prefix}:")]
    close = own or difflib.get_close_matches(prefix if "://" in rest else name, forms[:-1], n=2)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    if "://" in rest:
        # The address is not repeated: it may hold a password.
        raise UserError(f"unknown judge {prefix!r}{hint} ({known})")
    if not (colon and prefix and rest):
        raise UserError(f"unknown judge {name!r}{hint} ({known})")
    try:
        found = getattr(importlib.import_module(prefix), rest)
        judge = found() if isinstance(found, type) else found
    except Exception as error:  # a user's module may fail in any way
        raise UserError(f"judge {name!r} cannot be loaded: {' '.join(str(error).split())}{hint} ({known})") from error
    if not isinstance(judge, Judge):
        raise UserError(f"judge {name!r} has no `name` and `judge(items)`{hint} ({known})")
    if not (isinstance(judge.name, str) and _FILE_NAME.fullmatch(judge.name)):
        raise UserError(f"judge {name!r} is named {judge.name!r}; give it letters, digits, '.', '_' and '-' only")
    return judge


def get_one_judge(name: str, option: str) -> Judge:
    """The judge called `name`, where several cannot be.

    Raises:
        UserError: It is a panel, or unknown.
    """
    if len(_seats(name)) > 1:
        raise UserError(f"{option} {name!r} names several judges; give one")
    return get_judge(name)


def _seats(name: str) -> list[str]:
    """The judges of a panel; a comma that no judge's name follows belongs to a file's name."""
    parts: list[str] = []
    for part in name.split(","):
        of_a_file = parts and ":" in parts[-1] and parts[-1].partition(":")[0].strip() not in _MAY_BE_EMPTY
        if of_a_file and part.strip() and ":" not in part and part.strip() not in JUDGES:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [part.strip() for part in parts] if len(parts) > 1 else [name]


def _about(load: Callable[..., Judge]) -> str:
    return " ".join((load.__doc__ or "").split())
