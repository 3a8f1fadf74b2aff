"""Tables of a panel of judges: its rates, its agreement, and where it disagrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepalign.attacks.prefill import ATTACK as PREFILL
from deepalign.judges.selftest import Answer
from deepalign.report.reading import Cell, Metrics, block, number, rate, rows, visible, whole
from deepalign.report.sections import Table, rate_cells, table_of

_SHOWN_CHARS = 600
_SETTINGS = "The headline is the majority's row; the spread of the others is what the choice of judge decides."
_RATE = ("ASR", "95 % interval", "successes", "scored", "unscored")


def panel_tables(metrics: Metrics) -> list[Table]:
    """All tables of the panel; none where one judge ruled."""
    found = (overall_table(metrics), agreement_table(metrics), rates_table(metrics), disagreements_table(metrics))
    return [table for table in found if table]


def overall_table(metrics: Metrics) -> Table | None:
    """Each judge's attack success rate over all attacks on the audited model."""
    found = [
        (visible(row.get("judge", "")), *rate_cells(rate(row.get("asr"))))
        for row in rows(block(metrics, "panel"), "overall")
    ]
    note = (
        "The same completions, judged by each. The majority is what more than half of the judges that scored say; a "
        "tie, or too few that scored, leaves a completion unscored. A judge of refusals counts all that does not "
        "refuse, a judge of harm only what it finds harmful."
    )
    return table_of("All attacks, by judge", ("judge", *_RATE), found, note)


def rates_table(metrics: Metrics) -> Table | None:
    """Each judge's attack success rate, by attack and setting; prefilling first, as in the headline."""
    found = [
        (visible(row.get("attack", "")), visible(row.get("variant", "")), visible(row.get("judge", "")),
         *rate_cells(rate(row.get("asr"))))
        for row in rows(block(metrics, "panel"), "rates")
    ]  # fmt: skip
    met = list(dict.fromkeys(row[:2] for row in found))
    # Depths by number, as they may have been asked for in any order; all else as it was met.
    places = {one: (one[0] != PREFILL, str(one[0]), _depth(str(one[1])), met.index(one)) for one in met}
    found.sort(key=lambda row: places[row[:2]])
    return table_of("Attack success rate by judge", ("attack", "setting", "judge", *_RATE), found, _SETTINGS)


def _depth(variant: str) -> int:
    return int(variant[2:]) if variant.startswith("k=") and variant[2:].isdigit() else -1


def agreement_table(metrics: Metrics) -> Table | None:
    """Kappa of each pair, and of all."""
    panel = block(metrics, "panel")
    found: list[tuple[Cell, ...]] = []
    for row in rows(panel, "pairs"):
        agreed, both = whole(row.get("num_agreed")), whole(row.get("num_both"))
        names = " and ".join(visible(name) for name in row.get("judges") or [])
        found.append((names, "Cohen", _kappa(row), agreed, both, visible(row.get("note") or "") or None))
    fleiss, judges = panel.get("fleiss"), list(panel.get("judges") or [])
    if isinstance(fleiss, Mapping):
        note = visible(fleiss.get("note") or "") or None
        found.append((f"all {len(judges)}", "Fleiss", _kappa(fleiss), None, whole(fleiss.get("num_items")), note))
    columns = ("judges", "kappa of", "kappa", "agreed", "scored by all of them", "why there is none")
    note = (
        "Kappa is agreement beyond what chance would give: 1 is complete, 0 no better than chance. It is low where "
        "nearly all verdicts are the same, however often the judges agree: read it beside the counts. Counted are all "
        "answers to should-refuse prompts, those of a base or an ablated copy too."
    )
    kept = [index for index in range(len(columns)) if index < 5 or any(row[index] for row in found)]
    cut = [tuple(row[index] for index in kept) for row in found]
    return table_of("Agreement of the judges", [columns[index] for index in kept], cut, note)


def _kappa(row: Mapping[str, object]) -> float | str:
    value = number(row.get("kappa"))
    return "undefined" if value is None else f"{value:.2f}"


def disagreements_table(metrics: Metrics) -> Table | None:
    """The completions on which the judges are of different minds."""
    panel = block(metrics, "panel")
    names = [str(name) for name in panel.get("judges") or []]
    listed = rows(panel, "disagreements")
    shown = any("completion" in row for row in listed)
    found: list[tuple[Cell, ...]] = []
    for row in listed:
        said = row.get("verdicts")
        verdicts = said if isinstance(said, Mapping) else {}
        cells: list[Cell] = [visible(row.get("prompt_id", "")), visible(row.get("attack", ""))]
        cells += [visible(row.get("variant", "")), whole(row.get("sample"))]
        cells += [visible(verdicts.get(name, "none")) for name in names]
        if shown:
            cells.append(visible(str(row.get("completion") or ""))[:_SHOWN_CHARS])
        found.append(tuple(cells))
    columns = ("prompt", "attack", "setting", "sample", *map(visible, names), *(("completion",) if shown else ()))
    total, of = whole(panel.get("num_disagreements")), whole(panel.get("num_completions"))
    redacted = "" if shown else " Completions are redacted; --show-completions has them."
    note = f"{total} of {of} completions; {len(listed)} are listed.{redacted}"
    return table_of("Where the judges disagree", columns, found, note)


def self_test_table(answers: Sequence[Answer]) -> Table:
    """What a judge says of completions with a known answer, the wrong ones first."""
    found = [
        (
            one.case.name,
            "right" if one.right else "WRONG",
            one.wanted or "nothing asked",
            one.ruling.status if one.ruling.outcome != "held" else "no harm",
            visible(one.ruling.reason),
        )
        for one in sorted(answers, key=lambda one: one.right)
    ]
    asked = [one for one in answers if one.wanted]
    right = sum(one.right for one in asked)
    note = f"{right} of {len(asked)} right. All texts are harmless stand-ins: this finds gross faults only."
    return Table("Self-test of a judge", ("case", "", "wanted", "said", "reason"), tuple(found), note)
