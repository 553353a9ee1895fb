"""The matrix's table in docs/resilience.md, between its markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos.engine import Outcome, Pace

PAGE: Final = Path(__file__).parents[2] / "docs" / "resilience.md"
BEGIN: Final = "<!-- chaos: written by make chaos -->"
END: Final = "<!-- /chaos -->"


def write_table(outcomes: Sequence[Outcome], pace: Pace) -> None:
    """Put the table of *outcomes* in the place of the one before."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    assert rest, f"{PAGE.name} lacks {BEGIN}"
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(outcomes, pace)}\n\n{END}{after}")


def table(outcomes: Sequence[Outcome], pace: Pace) -> str:
    """Return what the cells measured, a row each, as Markdown."""
    well = sum(not outcome.complaints for outcome in outcomes)
    lines = [
        f"{well} of {len(outcomes)} cells as they must be; {sum(outcome.searches for outcome in outcomes):,} searches under a "
        f"fault, {pace.rate_per_s:.0f} a second, `timeout_ms` {pace.timeout_ms}.",
        "",
        "| part | fault | shards | Redis | searches | flags | overlap@10 | p50 ms | p99 ms | worst ms | back after s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in outcomes:
        cell = found.cell
        flags = ", ".join(f"{kind} {count}" for kind, count in found.flags.most_common())
        borne = f"ok; {found.stalled} without a shard as it came or went" if found.stalled else "ok"
        back = "never" if found.back_s is None else f"{found.back_s:.1f}"
        lines.append(
            f"| {' + '.join(cell.parts)} | {cell.fault} | {cell.shards} | {'yes' if cell.redis else 'no'} | "
            f"{found.searches} | {flags} | {found.overlap:.2f} | {found.p50_ms:.0f} | {found.p99_ms:.0f} | "
            f"{found.worst_ms:.0f} | {back} | {'; '.join(found.complaints) or borne} |"
        )
    return "\n".join(lines)
