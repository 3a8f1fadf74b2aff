"""Llama Guard 3 and 4: safe or unsafe, and which of the hazards S1 to S14.

Their chat templates are the prompt: given a user and an assistant message they ask about the last 'Agent' message. The
score is, as their model cards have it, the probability of "unsafe" where the label is written, here against "safe".
Version 4 is a Llama 4 with an image encoder, of which the text part is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from deepalign.chat import ChatTemplate, conversation
from deepalign.errors import UserError
from deepalign.judges.guards.formats import About
from deepalign.judges.guards.reader import Ids, Reader, Reply, Weighed, spaced
from deepalign.judges.guards.rulings import harm_ruling, unscored
from deepalign.judges.guards.sources import Weights
from deepalign.records import JudgeInput, Message, Ruling

_SIZES = {
    3: {
        "8b": Weights(
            hub_id="meta-llama/Llama-Guard-3-8B", revision="7327bd9f6efbbe6101dc6cc4736302b3cbb6e425", gated=True
        ),
        "1b": Weights(
            hub_id="meta-llama/Llama-Guard-3-1B", revision="acf7aafa60f0410f8f42b1fa35e077d705892029", gated=True
        ),
    },
    4: {
        "12b": Weights(
            hub_id="meta-llama/Llama-Guard-4-12B", revision="87acb4b94e930c3d679e6e7ee9d57e2feab9ea71", gated=True
        )
    },
}
_MAX_NEW_TOKENS = 64
_REPLY = re.compile(r"\s*(?:(safe)|unsafe\n(S\d{1,2}(?:, ?S\d{1,2})*))\s*")
_LABELS = {"safe": spaced("safe"), "unsafe": spaced("unsafe")}
_CHUNK = 8192
"""Llama 4's own; the published configuration of Llama Guard 4 has null there, with which no pass runs."""


class LlamaGuard:
    """Llama Guard's format."""

    def __init__(self, version: Literal[3, 4]) -> None:
        """Choose the generation.

        Args:
            version: Whose weights; the format is one.
        """
        self.about = About(
            name=f"llama-guard-{version}",
            sizes=_SIZES[version],
            tells_refusals=False,
            markers=re.compile(r"<(?:BEGIN|END) CONVERSATION>|^[ \t]*(?:User|Agent):", re.MULTILINE),
            rule_text=f"{_REPLY.pattern} {_MAX_NEW_TOKENS}",
        )

    def rule(self, reader: Reader, template: ChatTemplate | None, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rulings in order."""
        if template is None or "<BEGIN UNSAFE CONTENT CATEGORIES>" not in template.text:
            raise UserError("the weights' chat template is not Llama Guard's; give a whole copy of that model")
        set_chunks(reader.model)
        prompts = [reader.render(template, self.messages(item)) for item in items]
        replies = reader.write(prompts, max_new_tokens=_MAX_NEW_TOKENS)
        labelled = [
            (*ids, *before_label(reader, reply))
            for ids, reply in zip(prompts, replies, strict=True)
            if not reply.problem
        ]
        weighed = iter(reader.weigh(labelled, _LABELS))
        return [
            unscored(reply.problem) if reply.problem else self.parse(reply.text, next(weighed)) for reply in replies
        ]

    def messages(self, item: JudgeInput) -> tuple[Message, ...]:
        """The conversation that the template shows."""
        return (*conversation(item.prompt, None), Message(role="assistant", content=item.response))

    def parse(self, text: str, weighed: Weighed) -> Ruling:
        """A ruling from what was written, with the probability of "unsafe" as its score."""
        found = _REPLY.fullmatch(text)
        if found is None:
            return unscored("not Llama Guard's format", text)
        safe, hazards = found.groups()
        score = None if weighed.problem else weighed.share("unsafe")
        return harm_ruling(harmful=not safe, score=score, reason="safe" if safe else f"unsafe: {hazards}", raw=text)


def before_label(reader: Reader, reply: Reply) -> Ids:
    """The written line breaks that come before the label."""
    count = 0
    while count < len(reply.ids) and not reader.tokenizer.decode(reply.ids[: count + 1]).strip():
        count += 1
    return reply.ids[:count]


def set_chunks(model: Any) -> None:
    """Give a Llama 4 whose configuration has none the length of its attention's chunks."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "attention_chunk_size", 0) is None:
            config.attention_chunk_size = _CHUNK
