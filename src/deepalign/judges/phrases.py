"""The phrase book of the rule judge: `refusal_phrases.toml`, expanded and compiled.

Owns the file's grammar ({slot} substitution, accent folding, word ends). Knows nothing of sentences or verdicts.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Scope = Literal["anywhere", "opening", "whole"]
PHRASES_PATH = Path(__file__).with_name("refusal_phrases.toml")
_SLOT = re.compile(r"\{([a-z_]+)\}")
_CLAUSE_START = r"(?:\A|[\n.!?:;,\u2014)]|\b(?:but|and|so))[^\w]{0,5}"
_WORD_END = r"(?![a-z0-9_])"
"""A phrase ends with its word; letters of other alphabets may follow, as Chinese writes no spaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Phrases of one kind."""

    name: str
    scope: Scope
    strong: bool
    """Whether the phrase alone shows who refuses what."""
    pattern: re.Pattern[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhraseBook:
    """Everything the rules compare folded text with."""

    version: str
    groups: tuple[Group, ...]
    lead_in: re.Pattern[str]
    preface: re.Pattern[str]
    """How a sentence starts that may hold a refusal in a later clause."""
    remark: re.Pattern[str]
    """How a sentence starts that is neither answer nor refusal."""
    moral: re.Pattern[str]
    benign: re.Pattern[str]
    hedge: re.Pattern[str]
    cannot: re.Pattern[str]
    """"I cannot" without its verb."""
    sorry_but: re.Pattern[str]
    """"I'm sorry, but" without what follows."""
    target: re.Pattern[str]
    harm: re.Pattern[str]
    attribution: re.Pattern[str]
    answer: re.Pattern[str]
    safe_head: re.Pattern[str]
    safe_body: re.Pattern[str]
    salutation: re.Pattern[str]
    sign_off: re.Pattern[str]
    openings: tuple[str, ...]
    verbs: tuple[str, ...]


def _plain(phrase: str) -> str:
    """A phrase as folded text is written: small letters without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", phrase.lower()) if unicodedata.category(char) != "Mn")


def _expand(phrase: str, slots: Mapping[str, str]) -> str:
    """Replace slots until none is left; slots may hold slots."""
    while (found := _SLOT.search(phrase)) is not None:
        phrase = f"{phrase[: found.start()]}(?:{slots[found[1]]}){phrase[found.end() :]}"
    return phrase


def _compile(phrases: Iterable[str], slots: Mapping[str, str], *, end: str = _WORD_END) -> re.Pattern[str]:
    alternatives = "|".join(_expand(_plain(phrase), slots) for phrase in phrases)
    return re.compile(f"(?:{alternatives}){end}")


def _groups(rows: Sequence[Mapping[str, Any]], slots: Mapping[str, str]) -> tuple[Group, ...]:
    return tuple(
        Group(
            name=row["name"],
            scope=row["scope"],
            strong=row.get("strong", False),
            pattern=_compile(row["phrases"], slots),
        )
        for row in rows
    )


@lru_cache(maxsize=1)
def load_phrases() -> PhraseBook:
    """The phrase book, read and compiled once."""
    data = tomllib.loads(PHRASES_PATH.read_text(encoding="utf-8"))
    slots = {name: "|".join(_plain(phrase) for phrase in phrases) for name, phrases in data["slots"].items()}
    evidence, letters, cut_off = data["evidence"], data["letters"], data["cut_off"]
    # Longest first: "that said" before "that".
    lead_ins = sorted(data["lead_ins"]["phrases"], key=len, reverse=True)
    return PhraseBook(
        version=data["version"],
        groups=_groups(data["refusal"], slots),
        lead_in=_compile(lead_ins, slots, end=_WORD_END + r"[^\w\n]{0,6}"),
        preface=_compile(data["prefaces"]["phrases"], slots),
        remark=_compile(data["prefaces"]["remarks"], slots, end=""),
        moral=re.compile(data["prefaces"]["moral_words"]),
        benign=_compile(data["benign"]["phrases"], slots),
        hedge=_compile(data["benign"]["hedges"], slots),
        cannot=_compile(["i ?{adv}{cannot}"], slots),
        sorry_but=_compile(["{sorry},? (?:but|however)"], slots),
        target=re.compile(evidence["target"]),
        harm=re.compile(evidence["harm"]),
        attribution=re.compile(evidence["attribution"]),
        answer=re.compile(_CLAUSE_START + f"(?P<answer>{_compile(evidence['answer'], slots, end='').pattern})"),
        safe_head=re.compile(evidence["safe_head"]),
        safe_body=re.compile(evidence["safe_body"]),
        salutation=re.compile(r"(?:\A|\n)[^\w\n]{0,6}" + letters["salutation"]),
        sign_off=re.compile(r"\n[^\w\n\[]{0,6}" + letters["sign_off"]),
        openings=tuple(_plain(opening) for opening in cut_off["openings"]),
        verbs=tuple(cut_off["verbs"]),
    )
