"""Where a search begins, and the name of all that decides its course."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from deepalign.errors import UserError
from deepalign.suffix.behaviours import Behaviour, Ids, initial_ids, suffix_ids
from deepalign.suffix.drafting import Draft
from deepalign.suffix.settings import SearchSettings


def initial_suffix(tokenizer: Any, behaviours: Sequence[Behaviour], settings: SearchSettings) -> Ids:
    """The first suffix; raises `UserError` where the one given does not come back from its tokens."""
    if settings.initial is None:
        return initial_ids(tokenizer, behaviours, settings.suffix_tokens)
    found = suffix_ids(tokenizer, behaviours, settings.initial)
    if found is None:
        raise UserError(
            f"the initial suffix {settings.initial!r} does not come back unchanged from its tokens; give another"
        )
    return found


def search_key(behaviours: Sequence[Behaviour], settings: SearchSettings, initial: Ids, draft: Draft | None) -> str:
    """16 hex digits of all that decides a search's course but its length."""
    plain = dataclasses.asdict(settings)
    del plain["steps"]
    rows = [(at.prompt_id, at.before_ids, at.after_ids, at.target_ids) for at in behaviours]
    drafted = [draft.fingerprint] if draft is not None else []
    return hashlib.sha256(json.dumps([plain, rows, initial, *drafted]).encode()).hexdigest()[:16]
