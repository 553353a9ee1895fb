"""The matrix's table in docs/resilience.md, between its markers: a row for each cell, as it went when it was last run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos.engine import Outcome, Pace
from tests.chaos.matrix import Cell, whole

PAGE: Final = Path(__file__).parents[2] / "docs" / "resilience.md"
BEGIN: Final = "<!-- chaos: written by make chaos -->"
END: Final = "<!-- /chaos -->"
_HEAD: Final = (
    "| part | fault | shards | Redis | searches | flags | overlap@10 | p50 ms | p99 ms | worst ms | back after s | |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)
_NAMED: Final = 5  # The row's first fields, of which one is empty, are its cell's name,
_SEARCHES: Final = 5  # the next is how many searches there were,
_VERDICT: Final = -2  # and the last but an empty one says what was wrong.


def write_table(outcomes: Sequence[Outcome], pace: Pace) -> None:
    """Put the rows of *outcomes* in the place of those before; other cells of the matrix keep theirs."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    assert rest, f"{PAGE.name} lacks {BEGIN}"
    old, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(outcomes, pace, old)}\n\n{END}{after}")


def table(outcomes: Sequence[Outcome], pace: Pace, old: str = "") -> str:
    """Return what the cells measured, a row each, as Markdown; rows of cells that did not run are those of *old*."""
    rows = {_name(line): line for line in old.splitlines() if line.startswith("| ")}
    rows |= {_key(found.cell): _row(found) for found in outcomes}
    kept = [rows[key] for key in dict.fromkeys(map(_key, whole())) if key in rows]
    well = sum(_fields(row)[_VERDICT] == "ok" for row in kept)
    searches = sum(int(_fields(row)[_SEARCHES]) for row in kept)
    said = (
        f"{well} of {len(kept)} cells as they must be; {searches:,} searches under a fault, {pace.rate_per_s:.0f} a second, "
        f"`timeout_ms` {pace.timeout_ms}."
    )
    return "\n".join([said, "", *_HEAD, *kept])


def _key(cell: Cell) -> str:
    return f"| {' + '.join(cell.parts)} | {cell.fault} | {cell.shards} | {'yes' if cell.redis else 'no'} "


def _name(row: str) -> str:
    return "|".join(row.split("|")[:_NAMED])


def _fields(row: str) -> list[str]:
    return [field.strip() for field in row.split("|")]


def _row(found: Outcome) -> str:
    flags = ", ".join(f"{kind} {count}" for kind, count in found.flags.most_common())
    back = "never" if found.back_s is None else f"{found.back_s:.1f}"
    wrong = "; ".join(found.complaints).replace("|", "/")
    return (
        f"{_key(found.cell)}| {found.searches} | {flags} | {found.overlap:.2f} | {found.p50_ms:.0f} | {found.p99_ms:.0f} | "
        f"{found.worst_ms:.0f} | {back} | {wrong or 'ok'} |"
    )
