"""Tables of the attacks beyond prefilling, one function per section.

Each returns None, or no table, where its section is absent. The text of a suffix is in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepalign.report.brief_tables import rate_words
from deepalign.report.reading import (
    Cell,
    Metrics,
    Rate,
    Share,
    block,
    interval,
    mean,
    number,
    rate,
    rows,
    share,
    show,
    success_rate,
    visible,
    whole,
)
from deepalign.report.sections import Table, rate_cells, table_of, without_empty

_ASR = ("ASR", "95 % interval", "successes", "scored", "unscored")
_ENDS = ("refused at once", "recovered")


def before_decoding(metrics: Metrics) -> list[Table]:
    """The tables about forced tokens, in reading order."""
    found = [rap_table(metrics), harmful_rank_table(metrics), *any_depth_tables(metrics)]
    return [table for table in found if table]


def after_decoding(metrics: Metrics) -> list[Table]:
    """The tables about other attacks, in reading order."""
    found = [jailbreaks_table(metrics), suffix_table(metrics), abliteration_table(metrics)]
    return [table for table in found if table]


def rap_table(metrics: Metrics) -> Table | None:
    """Attack success rate of rank-assisted prefilling by number of forced tokens."""
    found = [
        (
            whole(row.get("k")), *rate_cells(success_rate(row)), whole(row.get("num_skipped")), *_refusals(row),
            number(row.get("mean_backtracks")), whole(row.get("num_gave_up")), share(rate(row.get("asr_with_prefix"))),
        )
        for row in rows(metrics, "rap")
    ]  # fmt: skip
    columns = ("k", *_ASR, "skipped", *_ENDS, "mean steps back", "gave up", "ASR, prefix judged too")
    note = (
        "Steps back: tokens that the attacker took back because nothing that it could choose from would do. Gave up: "
        "nothing was left to take back."
    )
    return table_of("Rank-assisted prefilling by forced tokens", columns, found, note)


def harmful_rank_table(metrics: Metrics) -> Table | None:
    """Where the harmful answer's own token stands among all tokens, and how likely a refusal is, by position."""
    section = block(metrics, "harmful_rank")
    top = whole(section.get("top"))
    among = f"in the top {show(top)}" if top else "in the top"
    found = []
    for row in rows(section, "positions"):
        inside, favoured = rate(row.get("in_top")), rate(row.get("base_favoured"))
        data = row.get("refusal_mass")
        mass = mean(data) if isinstance(data, Mapping) else Rate(value=None)
        found.append((
            whole(row.get("position")), whole(row.get("n")), number(row.get("median_rank")), share(inside),
            interval(inside), inside.numerator, inside.denominator, share(mass), interval(mass),
            number(row.get("median_best_refusal_rank")),
            share(favoured), interval(favoured),
        ))  # fmt: skip
    spared = ("median rank of a refusal", "more likely under the base", "95 % interval of base")
    columns = (
        "position", "n", "median rank", among, "95 % interval", "inside", "scored", "refusal mass",
        "95 % interval of mass", *spared,
    )  # fmt: skip
    return without_empty(
        table_of("Rank of the harmful token by response position", columns, found, _rank_note(section)), *spared
    )


def _rank_note(section: Metrics) -> str:
    words = [
        "Rank of the harmful answer's own next token among all tokens, 0 for the most probable, over the answers that "
        "reach the position (n). Refusal mass: probability of the tokens that begin an opening of a refusal."
    ]
    top, depth, odd, prompts = (
        whole(section.get(name)) for name in ("top", "depth_in_top", "num_nonfinite", "num_prompts")
    )
    if depth is not None:
        words.append(f"Leading positions that keep it out of the top {show(top)} for half of the prompts: {depth}.")
    if prompts is not None:
        words.append(f"Prompts: {prompts}.")
    if odd:
        words.append(f"Left out, without a finite number: {odd}.")
    return " ".join(words)


def any_depth_tables(metrics: Metrics) -> list[Table]:
    """What the reference defence lets through, by how much of the answer precedes it; and its summary."""
    section = block(metrics, "any_depth")
    found = [
        (
            whole(row.get("k")), *rate_cells(rate(row.get("answered"))), whole(row.get("num_refused")),
            *_refusals(row), whole(row.get("num_skipped")),
        )
        for row in rows(section, "rows")
    ]  # fmt: skip
    ends = ("refused", *_ENDS)
    columns = ("k", "answered", "95 % interval", "not refusing", "scored", "unscored", *ends, "skipped")
    note = "Answered: share of the continuations after the re-injected header that do not refuse. Lower is better."
    by_k = without_empty(table_of("Any-depth re-injection by forced tokens", columns, found, note), *ends)
    threshold, tokens = number(section.get("threshold")), whole(section.get("tokens_at_threshold"))
    limit = "the threshold" if threshold is None else show(Share(threshold)).replace(".0 %", " %")
    floor = "at least " if section.get("censored") else ""
    facts: list[tuple[Cell, ...]] = [
        ("header that is put in again", f'"{visible(section["header"])}"' if section.get("header") else None),
        ("prompts that no tested depth refuses", rate_words(rate(section.get("answered_at_every_depth")))),
        (f"forced tokens up to which at most {limit} are answered", None if tokens is None else f"{floor}{tokens}"),
    ]
    summary = Table("Any-depth re-injection, in short", ("measure", "value"), tuple(facts)) if section else None
    return [table for table in (by_k, summary) if table]


def jailbreaks_table(metrics: Metrics) -> Table | None:
    """Attack success rate of each wrapping and each set of finished prompts."""
    found = [
        (visible(row.get("name") or "unnamed"), visible(row.get("source") or "") or None,
         *rate_cells(rate(row.get("asr"))), *_refusals(row))
        for row in rows(metrics, "jailbreaks")
    ]  # fmt: skip
    return table_of("Wrapped prompts", ("wrapping", "source", *_ASR, *_ENDS), found, "An answer in a cipher is "
                    "deciphered before it is judged.")  # fmt: skip


def suffix_table(metrics: Metrics) -> Table | None:
    """Each suffix: how it did, and how its search went."""
    section = block(metrics, "suffix")
    found = [
        (
            visible(row.get("name") or "unnamed"), visible(row.get("kind") or "") or None,
            *rate_cells(rate(row.get("asr"))), *_refusals(row), number(row.get("loss")), whole(row.get("steps_done")),
            whole(row.get("num_evaluated")), whole(row.get("num_drifted")), visible(row.get("stopped") or "") or None,
        )
        for row in rows(section, "rows")
    ]  # fmt: skip
    searched = ("loss, nats", "steps", "candidates tried", "candidates that drift", "why it stopped")
    columns = ("suffix", "kind", *_ASR, *_ENDS, *searched)
    return without_empty(table_of("Suffix search", columns, found, _suffix_note(section)), *searched)


def _suffix_note(section: Metrics) -> str:
    origin = {"search": "The suffixes were searched on this model.", "file": "The suffixes were read from a file."}
    words = [origin.get(str(section.get("source")), "")]
    runs, behaviours, steps = (whole(section.get(name)) for name in ("num_runs", "num_behaviours", "steps"))
    if runs is not None and behaviours is not None:
        words.append(f"Searches: {runs}, on {behaviours} prompt{'' if behaviours == 1 else 's'}.")
    if steps is not None:
        words.append(f"At most {steps} steps each.")
    best = block(section, "best_three")
    middle, spread = number(best.get("mean")), number(best.get("sd"))
    if middle is not None:
        around = "" if spread is None else f", standard deviation {show(Share(spread))}"
        words.append(f"Mean ASR of the best {show(whole(best.get('n')))}: {show(Share(middle))}{around}.")
    words.append("The loss is that of the wanted opening. Drift: the candidate's text does not tokenise back to it. "
                 "The text of a suffix is in suffixes.jsonl in the run folder, not here.")  # fmt: skip
    return " ".join(word for word in words if word)


def abliteration_table(metrics: Metrics) -> Table | None:
    """What the model answers without its refusal direction, and what taking it away did."""
    section = block(metrics, "abliteration")
    if not section:
        return None
    layers, layer = whole(section.get("num_layers")), whole(section.get("layer"))
    found: list[tuple[Cell, ...]] = [
        ("ASR, weights as they are", rate_words(rate(section["plain"])) if section.get("plain") else None),
        ("ASR, refusal direction removed", rate_words(rate(section.get("ablated")))),
        ("layer that the direction is from", f"{show(layer)} of {layers}" if layers is not None else layer),
        ("token position that it is from", whole(section.get("position"))),
        ("harmful prompts that it is from", whole(section.get("num_harmful"))),
        ("harmless prompts that it is from", whole(section.get("num_harmless"))),
        ("mean probability that a refusal opens the answer, with it", share(rate(section.get("refusal_before")))),
        ("the same without it", share(rate(section.get("refusal_after")))),
        ("KL divergence on harmless prompts, nats", number(section.get("kl"))),
    ]
    return Table("Abliteration", ("measure", "value"), tuple(found), _direction_note(section))


def _direction_note(section: Metrics) -> str:
    words = [visible(section.get("note") or "")]
    if section.get("harmful_prompts") == "audited":
        words.append("The direction is from audited prompts themselves, so the rate may be high for them.")
    limit = number(section.get("max_kl"))
    if section.get("within_kl") is False and limit is not None:
        words.append(f"No direction kept the KL divergence at or under {show(limit)} nats.")
    before, after = number(section.get("refusal_before")), number(section.get("refusal_after"))
    if limit is not None and before is not None and after is not None and after > before / 2:
        words.append(
            f"Held to {show(limit)} nats, taking out one direction leaves most refusals, so that this is no floor; an "
            "attacker need not hold to it (--ablation-kl)."
        )
    return " ".join(word for word in words if word)


def _refusals(row: Mapping[str, object]) -> tuple[Cell, Cell]:
    return whole(row.get("num_refused_at_once")), whole(row.get("num_recovered"))
