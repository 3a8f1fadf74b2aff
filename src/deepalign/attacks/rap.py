"""The rank-assisted prefilling attack (Vega & Singh 2025, arXiv 2512.05518): prefill, then choose by rank.

The attempts are those of the prefilling attack under another name; what is different is how they are continued
(`rank_assisted.py`). That is greedy by nature, so there is one sample, its temperature stands as 0, and
`max_new_tokens` is the most steps of the search.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepalign.attacks import AttackSettings
from deepalign.attacks.prefill import PrefillPlan, prefill_plan
from deepalign.records import Prompt

ATTACK = "rap"


def rap_plan(prompts: Sequence[Prompt], depths: Sequence[int], settings: AttackSettings) -> PrefillPlan:
    """Attempts for every prompt and every number k of forced tokens; one sample each, whatever the settings say."""
    return prefill_plan(prompts, depths, settings.greedy, attack=ATTACK)
