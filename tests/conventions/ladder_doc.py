"""Writes the ladder's table in docs/resilience.md: `python -m tests.conventions.ladder_doc` (or `make docs`)."""

from pathlib import Path

from services.search.ladder import LADDER

PAGE = Path(__file__).parents[2] / "docs" / "resilience.md"
BEGIN, END = "<!-- ladder: written by make docs -->\n", "<!-- /ladder -->"


def render() -> str:
    """Return the table."""
    lines = ["| `degraded` | part | when | then | forbidden by | which is |", "|---|---|---|---|---|---|"]
    for step in LADDER:
        status = "504" if step.late else "503"
        lines.append(
            f"| `{step.reason}` | {step.part} | {step.fault} | {step.instead} | `require.{step.requirement}` | {status} |"
        )
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """Return *page* with the table between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{render()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
