"""What all guard judges share: which texts are read, as what, and what is remembered.

A guard is one small file: its weights, its prompt, and how its answer becomes a ruling. The runner loads the weights
when the first text comes, leaves out what holds no words, clips where the guard's authors clip, and breaks up the
guard's own markers in the judged texts, so that no text can end its part of the prompt. Each of these is said in the
ruling's reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from deepalign.chat import PLAIN_TEMPLATE, ChatTemplate
from deepalign.errors import UserError
from deepalign.judges.folding import fold
from deepalign.judges.guards.formats import Guard
from deepalign.judges.guards.reader import Reader
from deepalign.judges.guards.rulings import unscored
from deepalign.judges.guards.sources import Source
from deepalign.judges.readability import why_empty
from deepalign.models import Dtype, load_model
from deepalign.records import JudgeInput, Ruling

_REMEMBERED = 4096


class GuardJudge:
    """A judge that asks a guard model."""

    def __init__(self, guard: Guard, source: Source) -> None:
        """Name the judge; nothing is loaded yet.

        Args:
            guard: The format.
            source: Its weights.
        """
        about = guard.about
        self.name = f"{about.name}-{source.suffix}" if source.suffix else about.name
        self.tells_refusals = about.tells_refusals
        self.version = f"{source.identity}#{hashlib.sha256(about.rule_text.encode()).hexdigest()[:12]}"
        self._guard = guard
        self._source = source
        self._placement: tuple[str, Dtype, int] = ("auto", "auto", 32)
        self._loaded: tuple[Reader, ChatTemplate | None] | None = None
        self._known: dict[JudgeInput, Ruling] = {}

    def ready(self, *, device: str = "auto", dtype: Dtype = "auto", max_batch: int = 32) -> None:
        """Fetch the weights where they are not there, and say what they run on; called before long work begins.

        Args:
            device: As for `load_model`.
            dtype: As for `load_model`.
            max_batch: Most texts at a time; memory may allow fewer.

        Raises:
            UserError: The weights cannot be had; one line that says where to ask.
        """
        self._placement = (device, dtype, max_batch)
        self._source.folders(self._guard.about.name)

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rule on each item; same order and length. Equal items are read once."""
        fresh = [item for item in dict.fromkeys(items) if item not in self._known]
        if fresh:
            ruled = dict(zip(fresh, self._rule(fresh), strict=True))
            # The next call often brings the same texts again, joined with an empty prefill.
            kept = [*self._known.items(), *ruled.items()][-_REMEMBERED:]
            answers = {**self._known, **ruled}
            self._known = dict(kept)
        else:
            answers = self._known
        return [answers[item] for item in items]

    def _rule(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        rulings = [unscored(reason) if (reason := why_empty(fold(item.response))) else None for item in items]
        places = [place for place, ruling in enumerate(rulings) if ruling is None]
        if places:
            reader, template = self._load()
            read = [self._prepared(reader, items[place]) for place in places]
            ruled = self._guard.rule(reader, template, [item for item, _ in read])
            for place, ruling, (_, notes) in zip(places, ruled, read, strict=True):
                reason = "; ".join(part for part in (ruling.reason, *notes) if part)
                rulings[place] = dataclasses.replace(ruling, reason=reason)
        return [ruling for ruling in rulings if ruling is not None]

    def _prepared(self, reader: Reader, item: JudgeInput) -> tuple[JudgeInput, list[str]]:
        about, notes = self._guard.about, []
        response = item.response
        if about.clip is not None:
            response = reader.clipped(response, about.clip)
            if response != item.response:
                notes.append(f"read the first {about.clip} tokens of the text")
        prompt, in_prompt = about.markers.subn(_broken, item.prompt)
        response, in_response = about.markers.subn(_broken, response)
        if in_prompt + in_response:
            notes.append(f"broke up {in_prompt + in_response} of the judge's own markers in what it read")
        return JudgeInput(prompt=prompt, response=response), notes

    def _load(self) -> tuple[Reader, ChatTemplate | None]:
        if self._loaded is None:
            device, dtype, max_batch = self._placement
            folder, base = self._source.folders(self._guard.about.name)
            try:
                loaded = load_model(
                    str(folder),
                    device=device,
                    dtype=dtype,
                    adapter_base=None if base is None else str(base),
                    fallback_template=ChatTemplate(text=PLAIN_TEMPLATE, source="none"),
                )
            except UserError as error:
                raise UserError(f"judge {self.name!r}: {error}") from error
            own = loaded.template if loaded.template.source == "model" else _beside_processor(folder)
            self._loaded = (Reader(loaded, max_batch=max_batch), own)
        return self._loaded


def _beside_processor(folder: Path) -> ChatTemplate | None:
    """The chat template that models with image encoders may keep with their processor."""
    try:
        text = json.loads((folder / "chat_template.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return ChatTemplate(text=text, source="processor") if isinstance(text, str) else None


def _broken(found: re.Match[str]) -> str:
    marker = found.group()
    return f"{marker[:-1]} {marker[-1]}"
