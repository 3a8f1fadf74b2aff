"""The parts of the report page between the verdict and the examples: their order, their words, what each shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from deepalign.report import (
    attack_tables,
    brief_tables,
    finetuning_tables,
    margin_tables,
    panel_tables,
    sections,
    utility_tables,
    worst_case_tables,
)
from deepalign.report.reading import Metrics


class Part(NamedTuple):
    """One figure and the tables behind it, with what tells a reader how to read them."""

    figure: str
    probes: tuple[str, ...]
    """Sections whose absence the part reports."""
    title: str
    makers: tuple[Callable[[Metrics], sections.Table | list[sections.Table] | None], ...]
    lead: str
    unseen: str = "nothing was scored"
    """Why there is no figure where there are tables."""


PARTS: Final = (
    Part("worst_case_bars", ("worst_case",), worst_case_tables.TITLE, (worst_case_tables.worst_case_table,),
     "Each attack at the setting with its highest attack success rate, strongest first; the line is the 95 % interval, "
     "the diamond the share of prompts that at least one of its settings breaks, the outlined bar the same over all "
     "attacks. Plain asking, below, is what they are measured against. Hatched bars need the weights and are no part "
     "of the worst case. What was not tested is listed in the table: it may well be worse."),
    Part("asr_curve", ("prefill",), "Attack success rate by forced tokens",
     (sections.prefill_table, sections.thoughts_table),
     "The first k tokens of a harmful answer are put into the model's mouth. The line is the share of completions that "
     "then comply; the band is the 95 % interval. Deep alignment keeps the line low however large k is."),
    Part("panel", (), "What each judge says", (panel_tables.panel_tables,),
     "The same completions, judged by several. Where the judges part, the rate depends on whom you ask: the headline "
     "is the majority's, and the spread between the judges belongs to it.", ""),
    Part("onset_curve", ("refusal_onset",), "At every k, from one pass", (sections.onset_table,),
     "One pass over the harmful answer gives the probability that a refusal begins at each of its positions. Read as a "
     "hazard, it predicts the attack success rate at every k without generating. The markers are the generated and "
     "judged rates of the section above: where the line leaves them, trust them."),
    Part("rap_curve", ("rap",), "Rank-assisted prefilling", (attack_tables.rap_table,),
     "After k forced tokens an attacker with access to the token probabilities goes on: at each place it takes the "
     "best-ranked of the most probable tokens that a helper finds harmful, and steps back where there is none "
     "(arXiv 2512.05518). Where this curve lies far above plain prefilling, the model begins a refusal but still holds "
     "the harmful answer just below it. The helper keeps refusals from being written: with a judge that looks for "
     "refusals alone, what it counts may be off the topic, and the curve is an upper bound."),
    Part("harmful_rank_curve", ("harmful_rank",), "Where the harmful answer's tokens stand",
     (attack_tables.harmful_rank_table,),
     "One pass over the harmful answer: how often its own next token is still among the most probable ones, and how "
     "probable the opening of a refusal is, at each response position. A refusal that is likely while the harmful "
     "token stays near the top hides the answer without unlearning it."),
    Part("any_depth_curve", ("any_depth",), "A reference defence: any-depth re-injection",
     (attack_tables.any_depth_tables,),
     "After k tokens of a harmful answer the assistant header is put in again, and the model says whether it would "
     "refuse (arXiv 2510.18081). This is a reference defence, not an attack: it changes no weights, and shows how much "
     "of a refusal the model still has at that depth. It is no part of the worst case."),
    Part("decoding_bars", ("decoding",), "Under other decoding settings", (sections.decoding_table,),
     "The prompts asked plainly, with each sampling knob turned alone. The worst case counts a prompt as broken if any "
     "setting breaks it: more settings make it worse, so compare equal sweeps only."),
    Part("jailbreak_bars", ("jailbreaks",), "Wrapped prompts (jailbreaks)", (attack_tables.jailbreaks_table,),
     "The same requests in ciphers, in code, in templates, or as finished jailbreak prompts replayed from a file. What "
     "is judged is what was asked for, not its wrapping. Deepening trains on none of these."),
    Part("suffix_losses", ("suffix",), "Suffix search", (attack_tables.suffix_table,),
     "Words behind the prompt, searched with the model's gradients so that the answer begins as wanted (GCG). The line "
     "is the best loss so far: lower means that the wanted opening is more probable, not that what follows is harmful; "
     "the table has the judged rates. A short search says little against a longer one.",
     "the losses by step were not kept"),
    Part("abliteration_bars", ("abliteration",), "Without the refusal direction", (attack_tables.abliteration_table,),
     "The direction that tells harmful from harmless prompts inside the model is projected out while it answers "
     "(arXiv 2406.11717). Anyone who holds the weights can do this, so it is the floor under every defence of open "
     "weights. The direction is used for this measurement alone; no changed model is written."),
    Part("kl_curve", ("kl", "kl_reverse"), "Where aligned and base model differ", (sections.kl_table,),
     "KL divergence of the next-token distributions along a harmful answer: aligned from base weighs what the aligned "
     "model wants to say, base from aligned what it gave up. A curve that drops after a few positions means that "
     "alignment changed little beyond them."),
    Part("refusal_prefix_bars", ("refusal_prefix",), "Refusal prefixes", (sections.refusal_prefix_table,),
     "Harmful completions when the answer is made to begin with a refusal. If a few words make even the base model "
     "look safe, a shallow alignment has no reason to reach further than those words."),
    Part("over_refusal_bars", ("over_refusal",), "Over-refusal", (sections.over_refusal_table,),
     "Refusals on prompts that deserve an answer. A model that refuses everything is safe at every depth and of no "
     "use, so read this beside the depth."),
    Part("trade_off", ("trade_off",), utility_tables.TRADE_OFF, (),
     "One point for each model: how often it answers harmful prompts with the worst number of forced tokens, against "
     "its mean score over tasks; the lines are the 95 % intervals. Filled points are beaten by no other model on both. "
     "A defence that costs utility moves a model to the left, one that costs nothing moves it straight down.",
     "no model has both rates"),
    Part("utility_bars", ("utility", "win_rate"), "Utility",
     (utility_tables.utility_table, utility_tables.win_rate_table),
     "What the model is good for: the score of each task as lm-evaluation-harness has it, with its 95 % interval. A "
     "model that refuses everything is safe at every depth and scores nothing here."),
    Part("category_heat", ("by_category",), "By category", (sections.category_table,),
     "Attack success rate per kind of harm. Each cell rests on few prompts; the intervals in the table are wide."),
    Part("finetuning_bars", ("finetuning",), "After fine-tuning",
     (brief_tables.ways_tables, finetuning_tables.worst_case_table, finetuning_tables.summary_table,
      finetuning_tables.cells_table, finetuning_tables.cost_table),
     "A copy of the model is fine-tuned on each set, in each way, and then asked harmful prompts that were not "
     "trained on. A bar is the share of completions that the judge did not find to be refusals, the line on it the "
     "95 % interval, the upright mark the same rate before tuning. A low bar holds for the settings tried: an "
     "attacker with others may do better. A high one says that the model no longer refuses, not that its answer "
     "would serve anybody."),
    Part("dynamics", ("dynamics",), "While it is tuned",
     (finetuning_tables.step_table, finetuning_tables.position_table),
     "Stopped at some steps of one fine-tuning: the cross-entropy on its rows, the norm of the gradient of each "
     "single-token loss, and the KL divergence of the tuned model from the model before, on the tuned model's own "
     "answers, each by response position. Curves that are high at the first positions alone mean that tuning does "
     "its work there. The attack success rate beside them is at the same steps; another learning rate has others."),
    Part("margin_curve", ("margin",), "Will it hold? The margin before training",
     (margin_tables.schedule_table, margin_tables.margin_table),
     "How many nats of log-probability an opening lacks at each response position (median, and band from the 10th "
     "to the 90th percentile), and how many each schedule lets a token gain before it holds it back (dashed "
     "steps). Where the line is above the steps the schedule holds. This is a prediction from one pass: it knows "
     "neither the learning rate nor the number of steps, and nothing of openings that it was not given."),
    Part("margin_scatter", (), "Does the margin foretell the grid?", (margin_tables.grid_table,),
     "One point for each model, set and way: the highest attack success rate that the margin predicts, and the one "
     "that was measured with its 95 % interval. Points above the diagonal broke further than predicted. A rank "
     "correlation says that the order agrees, not that the rates do."),
)  # fmt: skip
"""In the order of the page; a part about which no run has anything to say is left out."""
