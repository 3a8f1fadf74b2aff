"""The any-depth probe: the assistant header comes again after k tokens of a harmful answer (ADA-RK, arXiv 2510.18081).

The reference answer's first k ids are forced, then the ids that the template puts between the user's text and the
assistant's; what the model writes from there is its lookahead. A defence that needs no training, so that its rows stand
beside the attacks and never among them. Greedy, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepalign.attacks import AttackSettings
from deepalign.attacks.prefill import PrefillPlan, prefill_plan
from deepalign.errors import UserError
from deepalign.records import Prompt

ATTACK = "any_depth"


def any_depth_plan(
    prompts: Sequence[Prompt], depths: Sequence[int], settings: AttackSettings, header_ids: Sequence[int]
) -> PrefillPlan:
    """One greedy attempt for every prompt and every number k of answer tokens before the header.

    k counts tokens of the answer; the prefill is longer by the header.

    Args:
        prompts: Those with a reference answer of k tokens are tried, the others named.
        depths: Values of k, from 1.
        settings: Its sampling is made greedy, with one sample.
        header_ids: From `chat.assistant_header_ids`, at the site of the settings.

    Raises:
        UserError: There is no header, or a k under 1.
    """
    if not header_ids:
        raise UserError("any-depth needs the ids of an assistant header; pass a template that has one")
    if any(k < 1 for k in depths):
        raise UserError(f"any-depth at k = {min(depths)}: the header comes after 1 or more tokens of the answer")
    return prefill_plan(prompts, depths, settings.greedy, attack=ATTACK, then=tuple(header_ids))
