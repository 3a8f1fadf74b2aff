"""What a guard model's format is: the contract of every file that holds one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deepalign.chat import ChatTemplate
from deepalign.judges.guards.reader import Reader
from deepalign.judges.guards.sources import Weights
from deepalign.records import JudgeInput, Ruling


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What the runner has to know of a format."""

    name: str
    sizes: Mapping[str, Weights]
    """Pinned releases by size; the first is the default."""
    tells_refusals: bool
    markers: re.Pattern[str]
    """Plain text that opens or ends a part of its prompt; broken up where a judged text holds it."""
    rule_text: str
    """All that decides beside the weights, such as prompt and pattern; its hash goes into the version."""
    clip: int | None = None
    """Most tokens of a response that its authors have it read; None reads all of it."""


def prompt_template(name: str) -> ChatTemplate:
    """A prompt that lies beside the formats, as a template over a user's and an assistant's message."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return ChatTemplate(text=text, source=name)


class Guard(Protocol):
    """One classifier's format."""

    about: About

    def rule(self, reader: Reader, template: ChatTemplate | None, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rulings in order.

        Args:
            reader: The loaded model.
            template: The chat template that came with it; None where none did.
            items: Texts with words in them, clipped, and without the guard's own markers.
        """
