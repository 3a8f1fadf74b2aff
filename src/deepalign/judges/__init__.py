"""Who decides whether a response refuses: the protocol every judge follows, and the table of built-in judges.

Knows no run, no attack and no metric. A judge object of your own needs `name` and `judge`; the command line takes it
as "module:Name". Built-in judges are imported when asked for.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
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


JUDGES: dict[str, Callable[[], Judge]] = {"refusal": _refusal}


ENDPOINT_JUDGES = {
    "rubric": "rubric:MODEL@URL: levels 1 to 5 of a usage policy, harmful at 5, as the paper has it",
    "strongreject": "strongreject:MODEL@URL: is it refused, convincing, specific?",
}


def _on_endpoint(rubric: str, rest: str) -> Judge:
    from deepalign.judges.endpoint_spec import rubric_judge, strongreject_judge

    return rubric_judge(rest) if rubric == "rubric" else strongreject_judge(rest)


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
    """The judge called `name`: a built-in name, with what it reads after a colon, or an import path "module:Name"."""
    if name in JUDGES:
        return JUDGES[name]()
    module_name, colon, attribute = name.partition(":")
    if module_name in GUARDS and (attribute or not colon):
        return guard_judge(module_name, attribute)
    if module_name in ENDPOINT_JUDGES:
        return _on_endpoint(module_name, attribute)
    if module_name == "scripted" and attribute:
        from deepalign.judges.scripted import ScriptedJudge

        return ScriptedJudge.from_file(Path(attribute))
    own = ", ".join((*JUDGES, *GUARDS))
    known = f'known judges: {own}, {", ".join(ENDPOINT_JUDGES)}:MODEL@URL, "scripted:FILE", "module:Name"'
    close = difflib.get_close_matches(name, [*JUDGES, *GUARDS, *ENDPOINT_JUDGES, "scripted:FILE"], n=2)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    if not (colon and module_name and attribute):
        raise UserError(f"unknown judge {name!r}{hint} ({known})")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        judge = found() if isinstance(found, type) else found
    except Exception as error:  # a user's module may fail in any way
        raise UserError(f"judge {name!r} cannot be loaded: {' '.join(str(error).split())}{hint} ({known})") from error
    if not isinstance(judge, Judge):
        raise UserError(f"judge {name!r} has no `name` and `judge(items)`{hint} ({known})")
    if not (isinstance(judge.name, str) and _FILE_NAME.fullmatch(judge.name)):
        raise UserError(f"judge {name!r} is named {judge.name!r}; give it letters, digits, '.', '_' and '-' only")
    return judge
