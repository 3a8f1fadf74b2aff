"""Tables of a panel of judges: its rates, its agreement, and where it disagrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepalign.judges.selftest import Answer
from deepalign.report.reading import Cell, Metrics, block, number, rate, rows, visible, whole
from deepalign.report.sections import Table, rate_cells, table_of

_SHOWN_CHARS = 600


def panel_tables(metrics: Metrics) -> list[Table]:
    """All tables of the panel; none where one judge ruled."""
    found = (rates_table(metrics), agreement_table(metrics), disagreements_table(metrics))
    return [table for table in found if table]


def rates_table(metrics: Metrics) -> Table | None:
    """Each judge's attack success rate, by attack and setting."""
    panel = block(metrics, "panel")
    found = [
        (visible(row.get("attack", "")), visible(row.get("variant", "")), visible(row.get("judge", "")),
         *rate_cells(rate(row.get("asr"))))
        for row in rows(panel, "rates")
    ]  # fmt: skip
    found.sort(key=lambda row: (str(row[0]), _natural(str(row[1]))))
    found[:0] = [
        ("all", "all", visible(row.get("judge", "")), *rate_cells(rate(row.get("asr"))))
        for row in rows(panel, "overall")
    ]
    columns = ("attack", "setting", "judge", "ASR", "95 % interval", "successes", "scored", "unscored")
    note = (
        "The same completions, judged by each. The majority is what more than half of the judges that scored say; a "
        "tie, or too few that scored, leaves a completion unscored. A judge of refusals counts all that does not "
        "refuse, a judge of harm only what it finds harmful. All: every attack on the audited model."
    )
    return table_of("Attack success rate by judge", columns, found, note)


def _natural(text: str) -> tuple[str, int]:
    head, _, tail = text.partition("=")
    return head, int(tail) if tail.isdigit() else 0


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
        "nearly all verdicts are the same, however often the judges agree: read it beside the counts."
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
