"""The report: Markdown tables, a section for RESULTS.md, and a plot where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import Spread, number

SAMPLES_MB = "resident memory, MB"


@dataclass
class Row:
    """One row of the issue's table, measured: what was done, the figures, and what they say beside the peers."""

    name: str
    title: str
    method: str
    header: Sequence[str]
    lines: list[Sequence[str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    bars: dict[str, dict[str, Spread]] = field(default_factory=dict)  # quantity, then server: what the plot shows
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB
    paths: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)  # panel, then line: (x, y)
    axes: tuple[str, str] = ("", "")  # of `paths`


def markdown(row: Row) -> str:
    """Return *row* as a Markdown section."""
    lines = [f"### {row.title}", "", row.method, ""]
    if row.lines:
        lines += ["| " + " | ".join(row.header) + " |", "|" + "---|" * len(row.header)]
        lines += ["| " + " | ".join(line) + " |" for line in row.lines]
        lines.append("")
    lines += [f"* {finding}" for finding in row.findings]
    return "\n".join(lines).rstrip() + "\n"


def section(
    rows: Sequence[Row], *, commit: str, note: str, machine: Sequence[str], command: str, plot: str | None
) -> str:
    """Return the whole report of one run as a section of RESULTS.md."""
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"## {moment}, {commit}", "", f"What changed: {note or 'not said'}", "", f"Command: `{command}`", ""]
    lines += [f"* {line}" for line in machine]
    lines += ["", *(markdown(row) for row in rows)]
    if plot:
        lines.append(f"![figures by server]({plot})\n")
    return "\n".join(lines)


def append(path: Path, text: str) -> None:
    """Add *text* at the end of the file at *path*, which is made where it is missing."""
    before = path.read_text() if path.exists() else "# Measurements\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before.rstrip()}\n\n{text}")


def plot(rows: Sequence[Row], path: Path) -> bool:
    """
    Draw what *rows* measured into the PNG at *path*: a panel per quantity, a bar per server with its spread.

    Returns False, having said so, when matplotlib is not installed, and when there is nothing to draw.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'tercet[bench]')")
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [(row.title, quantity, bars) for row in rows for quantity, bars in row.bars.items()]
    curves = [row for row in rows if row.curve]
    paths = [(row, panel, lines) for row in rows for panel, lines in row.paths.items()]
    count = len(panels) + len(curves) + len(paths)
    if not count:
        return False
    columns = min(3, count)
    figure, axes = pyplot.subplots(
        -(-count // columns), columns, figsize=(4.6 * columns, 3.4 * -(-count // columns)), squeeze=False
    )
    spots = list(axes.flat)
    for spot, (title, quantity, bars) in zip(spots, panels, strict=False):
        medians = [value.median for value in bars.values()]
        below = [value.median - value.low for value in bars.values()]
        above = [value.high - value.median for value in bars.values()]
        drawn = spot.bar(list(bars), medians, yerr=[below, above], capsize=4, color=[f"C{i}" for i in range(len(bars))])
        spot.bar_label(drawn, labels=[number(median) for median in medians], padding=2, fontsize=8)
        spot.margins(y=0.2)
        spot.set_title(title, fontsize=8)
        spot.set_ylabel(quantity, fontsize=8)
        spot.tick_params(labelsize=7)
    for spot, row in zip(spots[len(panels) :], curves, strict=False):
        spot.plot([second for second, _ in row.curve], [mb for _, mb in row.curve])
        spot.set_ylim(bottom=0)
        spot.set_title(row.title, fontsize=8)
        spot.set_xlabel("seconds", fontsize=8)
        spot.set_ylabel(SAMPLES_MB, fontsize=8)
    for spot, (row, panel, lines) in zip(spots[len(panels) + len(curves) :], paths, strict=False):
        _draw_paths(spot, row.axes, panel, lines)
    for spot in spots[count:]:
        spot.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _draw_paths(
    spot: Any, axes: tuple[str, str], panel: str, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw a line each; the p99 of a server is dashed and of the same colour as its p50, which is before it."""
    colours: dict[str, str] = {}
    for name, points in lines.items():
        server, _, quantity = name.rpartition(" ")
        colour = colours.setdefault(server, f"C{len(colours)}")
        style = "--" if quantity == "p99" else "-"
        spot.plot([x for x, _ in points], [y for _, y in points], f"{style}o", color=colour, label=name, markersize=3)
    spot.set_yscale("log")
    spot.set_title(panel, fontsize=8)
    spot.set_xlabel(axes[0], fontsize=8)
    spot.set_ylabel(axes[1], fontsize=8)
    spot.tick_params(labelsize=7)
    spot.legend(fontsize=6)
