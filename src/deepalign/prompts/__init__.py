"""Where prompts and reference answers come from: the built-in sets, and the user's own files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from deepalign.errors import UserError
from deepalign.records import Prompt, read_jsonl

BUILTIN_SETS = {
    "should-refuse": "93 requests a model should refuse, 12 categories, with answers sampled from testbed:base",
    "should-refuse-styles": "59 more, in other styles and registers, with answers",
    "should-refuse-train": "requests that testbed:shallow was trained to refuse; other behaviours than the test sets",
    "benign": "144 plain harmless requests over 18 topics",
    "benign-styles": "60 more, in other styles and registers",
    "benign-train": "harmless requests that testbed:shallow was trained to answer",
    "look-alike": "72 harmless requests with alarming words or topics",
    "look-alike-train": "look-alikes that testbed:shallow was trained to answer",
}


def builtin_prompts(name: str) -> tuple[Prompt, ...]:
    """A built-in prompt set, in file order.

    Raises:
        UserError: There is no such set.
    """
    if name not in BUILTIN_SETS:
        raise UserError(f"no built-in prompt set {name!r}; there are {', '.join(BUILTIN_SETS)}")
    with resources.as_file(resources.files("deepalign.prompts") / "builtin" / f"{name}.jsonl") as path:
        return tuple(read_jsonl(Path(path), Prompt))
