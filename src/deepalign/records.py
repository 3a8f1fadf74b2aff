"""The nouns of the data flow and their JSON form: prompt -> attempt -> completion -> verdict.

Every joint between rooms is one of these records, written to disk as JSON Lines. Records carry keys and are joined
by key, never by position. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Status = Literal["refused", "complied", "unscored"]
"""Whether the alignment held. A judge of refusals says "refused" of a refusal and "complied" of anything else that
answers; a judge of harm says "complied" of what it finds harmful, and "refused" of all the rest."""
Outcome = Literal["refused_at_once", "recovered", "held", "complied", "unscored"]
"""How it came to that; "held": a judge of harm found none, and does not say where a refusal began."""
Site = Literal["raw", "content", "reasoning"]
"""Where in an assistant's turn a prefill is put; `thinking.py` says what each means."""
Role = Literal["target", "base", "ablated"]
"""The audited model, the one that it was aligned from, or the audited one without its refusal direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One user instruction, with the reference answer that prefilling takes its tokens from."""

    prompt_id: str
    text: str
    category: str = "uncategorised"
    behaviour: str = ""
    style: str = ""
    answer: str | None = None
    """Reference answer (for should-refuse prompts: the harmful one); None where none is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn; the paper's defaults (App. B.2 and its code)."""

    temperature: float = 0.9
    top_p: float = 0.6
    top_k: int = 50
    """0 turns the top-k filter off."""
    max_new_tokens: int = 64

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at each step."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What joins attempts, completions and verdicts, everywhere."""

    prompt_id: str
    attack: str
    variant: str
    sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One prompt as one attack presents it to one model."""

    prompt_id: str
    attack: str
    """Name of the attack, such as "prefill"."""
    variant: str
    """Its setting: "k=5", "I cannot", the name of a prompt set."""
    sample: int
    model: Role
    """Which model answers."""
    messages: tuple[Message, ...]
    prefill_ids: tuple[int, ...] = ()
    """Response token ids forced before sampling; ids, so that k means k."""
    prefill_text: str = ""
    site: Site = "raw"
    category: str = "uncategorised"
    asked: str = ""
    """What is asked for, where the messages disguise it: the prompt that a judge is shown."""
    reading: str = ""
    """How the answer is read before it is judged, where it was asked for in a cipher."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Seed of this row's own random stream, so that no row depends on its batch."""

    @property
    def key(self) -> Key:
        """The join key."""
        return Key(prompt_id=self.prompt_id, attack=self.attack, variant=self.variant, sample=self.sample)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote after the prefill."""

    prompt_id: str
    attack: str
    variant: str
    sample: int
    status: Literal["ok", "failed"]
    text: str = ""
    """Decoded answer without the prefill, and without thoughts; special tokens left out."""
    token_ids: tuple[int, ...] = ()
    """Everything that was written, thoughts too."""
    char_ends: tuple[int, ...] = ()
    """`char_ends[i]`: length of `text` after its token i, so that a character position becomes a token."""
    thoughts: str = ""
    """What a reasoning model wrote in its thinking block."""
    num_thought_tokens: int = 0
    """Leading ids that are not the answer: the thoughts and their markers."""
    prefill_in_thoughts: bool = False
    """Whether the prefill stood inside the thinking block."""
    finish: Literal["stop", "length", ""] = ""
    num_input_tokens: int = 0
    reason: str = ""
    """Why the attempt failed, when it did."""
    note: str = ""
    """What is not exact about the ids, where they had to be taken from a server's text."""

    @property
    def key(self) -> Key:
        """The join key."""
        return Key(prompt_id=self.prompt_id, attack=self.attack, variant=self.variant, sample=self.sample)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeInput:
    """What a judge sees: never the attack's name."""

    prompt: str
    response: str
    """The text to be judged: the completion alone, or prefill + completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What a judge says of one text."""

    status: Status
    outcome: Outcome
    reason: str = ""
    """The matched phrase, or why the text is unscored."""
    refusal_char: int | None = None
    """Character at which the first refusal begins, in the judged text."""
    refuses: bool | None = None
    """Whether the text refuses, harmful or not; None where the judge does not tell."""
    score: float | None = None
    """How harmful, on the judge's own scale; None where it has none."""
    raw: str = ""
    """What a model that judges wrote, unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A judge's two rulings on one completion: alone, and together with its prefill."""

    prompt_id: str
    attack: str
    variant: str
    sample: int
    judge: str
    status: Status
    outcome: Outcome
    reason: str = ""
    refusal_position: int | None = None
    """Response position (0-based, prefill tokens counted) at which the first refusal begins."""
    status_with_prefix: Status = "unscored"
    outcome_with_prefix: Outcome = "unscored"
    reason_with_prefix: str = ""
    refuses: bool | None = None
    """Whether the completion alone refuses, harmful or not; None where the judge does not tell."""
    score: float | None = None
    """How harmful the completion alone is, on the judge's own scale; None where it has none."""
    score_with_prefix: float | None = None
    raw: str = ""
    """What a model that judges wrote of the completion alone, unchanged."""
    raw_with_prefix: str = ""
    outcome_of_thoughts: Outcome | Literal[""] = ""
    """The ruling on the thoughts alone, "" where there were none; they count in no rate."""

    @property
    def key(self) -> Key:
        """The join key."""
        return Key(prompt_id=self.prompt_id, attack=self.attack, variant=self.variant, sample=self.sample)


Record = TypeVar("Record")


def to_json(record: Any) -> str:
    """One line of JSON for a record; non-ASCII characters are kept."""
    # Not `dataclasses.asdict`, which copies thousands of token ids one by one.
    return json.dumps(_fields(record), default=_fields, ensure_ascii=False, separators=(",", ":"))


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def from_dict(record_type: type[Record], data: Mapping[str, Any]) -> Record:
    """Rebuild a record from its JSON object; unknown fields raise `ValueError`."""
    if not isinstance(data, Mapping):
        raise ValueError(f"not an object but {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{record_type.__name__} has no field {unknown[0]!r}; its fields are {sorted(fields)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "messages":
            values[name] = tuple(Message(**turn) for turn in value)
        elif name == "sampling":
            values[name] = Sampling(**value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return record_type(**values)


def read_jsonl(path: Path, record_type: type[Record]) -> Iterator[Record]:
    """Read records from a JSON Lines file, in file order; a malformed line raises `ValueError` naming it.

    An unfinished last line, as a killed writer leaves, is not a record yet and is passed over.
    """
    # As bytes, because a killed writer may leave half of a character.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and line.endswith(b"\n"):
                try:
                    yield from_dict(record_type, json.loads(line.decode()))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error


def to_jsonl(records: Iterable[Any]) -> str:
    """JSON Lines text for records."""
    return "".join(to_json(record) + "\n" for record in records)
