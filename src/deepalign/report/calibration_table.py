"""What labels say of a judge, in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def render(data: dict[str, Any], console: Console) -> None:
    """Show the judge's accuracy, and judged beside corrected rates."""
    for name in ("sensitivity", "specificity"):
        found = data[name]
        counts = f"{found['numerator']}/{found['denominator']}"
        console.print(f"{name}  {counts}  {_text(found['rate'], found['ci95'])}", highlight=False, markup=False)
    if data["num_unscored"]:
        console.print(f"{data['num_unscored']} labelled completions are unscored by the judge", highlight=False)
    if data["note"]:
        console.print(data["note"], highlight=False, markup=False, soft_wrap=True)
    table = Table("attack", "variant", "judged", "corrected", box=None, padding=(0, 2, 0, 0))
    for row in data["rates"]:
        judged, corrected = _text(row["rate"], row["ci95"]), _text(row["corrected"], row["corrected_ci95"])
        table.add_row(escape(row["attack"]), escape(row["variant"]), escape(judged), escape(corrected))
    console.print(table)


def _text(rate: float | None, interval: tuple[float, float] | None) -> str:
    if rate is None or interval is None:
        return "-"
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
