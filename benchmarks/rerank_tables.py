"""The report on ranking quality as Markdown: nDCG@10 by row and set, what was to be reached, blends, and paired tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import nan
from statistics import fmean

from benchmarks.rerank_paired import compare
from benchmarks.rerank_sets import TESTED

RRF = "equal RRF, no rerank"
HYBRID = "hybrid, no rerank"
DEFAULT = "hybrid + rerank (default)"
WITHOUT_FIRST = "… without late interaction"
WITHOUT_LAST = "… without cross-encoder"
WITHOUT_BLEND = "… without blend"
ROWS = (RRF, HYBRID, DEFAULT, WITHOUT_FIRST, WITHOUT_LAST, WITHOUT_BLEND)

OVER_RRF, OVER_HYBRID, UNDER_HYBRID = 0.035, 0.015, 0.005

Values = Mapping[str, Mapping[str, float]]  # of each set, and in it of each query


@dataclass
class Quality:
    """
    What was measured: nDCG@10 of each query by row and set, the milliseconds of a search, and the sweep of blends.

    *blends* has the mean nDCG@10 of each set by row and weight, *blend* is the default weight, and *titles* has how each
    set is called in the tables, in their order.
    """

    titles: Mapping[str, str]
    blend: float
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    ms: dict[str, dict[str, float]] = field(default_factory=dict)
    blends: dict[str, dict[float, dict[str, float]]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def rows(self) -> list[str]:
        """Return the rows that were measured on all sets, in the order of the tables."""
        return [row for row in ROWS if self.values.get(row, {}).keys() >= self.titles.keys()]

    def means(self, row: str) -> dict[str, float]:
        """Return a row's nDCG@10 on each set."""
        return {name: fmean(self.values[row][name].values()) for name in self.titles}

    def mean(self, row: str) -> float:
        """Return the mean of a row's sets, each of which counts the same."""
        return fmean(self.means(row).values())

    def mean_never_trained_on(self, row: str) -> float:
        """Return the mean of those sets of which nothing was trained on; not a number where there are none."""
        values = [value for name, value in self.means(row).items() if name in TESTED]
        return fmean(values) if values else nan


def report(quality: Quality, *, commit: str, machine: Sequence[str], command: str, note: str) -> str:
    """Return the whole report."""
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = [
        "# Ranking quality of searches, with and without rerank",
        "",
        f"{moment}, {commit}. {note}".rstrip(),
        "",
        f"Command: `{command}`",
        "",
        *(f"* {line}" for line in [*machine, *quality.facts]),
        "",
        "Real services over HTTP, documents written by the client, every query asked with time enough for a whole answer. "
        "cranfield, wikiqa (all judged questions) and scifact (its test) were never trained on; of the sets that the shipped "
        "model is trained on there are the questions that training keeps back, by article or disease (400 of them at most). "
        "cranfield's judgements are the classic ones, code -1 included. The mean is over the sets, each of which counts the "
        "same, and once more over the three alone.",
        "",
    ]
    parts = [head, ndcg(quality), reached(quality), blends(quality), tests(quality)]
    return "\n".join(line for part in parts for line in part)


def ndcg(quality: Quality) -> list[str]:
    """Return the table of rows by sets."""
    titles = [*quality.titles.values(), "mean", "mean of the three", "ms a search"]
    lines = ["## nDCG@10", "", *_header("searches", titles)]
    for row in quality.rows():
        ms = f"{fmean(quality.ms[row].values()):.0f}" if row in quality.ms else ""
        values = [*quality.means(row).values(), quality.mean(row), quality.mean_never_trained_on(row)]
        lines.append(_line(row, [*map(_three, values), ms]))
    return [*lines, ""]


def reached(quality: Quality) -> list[str]:
    """Return what the default was to reach, and what it did."""
    default, hybrid = quality.means(DEFAULT), quality.means(HYBRID)
    over_rrf = quality.mean(DEFAULT) - quality.mean(RRF)
    over_hybrid = quality.mean(DEFAULT) - quality.mean(HYBRID)
    worst = min(default, key=lambda name: default[name] - hybrid[name])
    least = default[worst] - hybrid[worst]
    return [
        f"* mean over equal RRF: {over_rrf:+.4f} (to reach: ≥ +{OVER_RRF}): {_said(over_rrf >= OVER_RRF)}",
        f"* mean over hybrid without rerank: {over_hybrid:+.4f} (to reach: ≥ +{OVER_HYBRID}): "
        f"{_said(over_hybrid >= OVER_HYBRID)}",
        f"* the set that gains least, {worst}: {least:+.4f} (to reach: ≥ −{UNDER_HYBRID}): {_said(least >= -UNDER_HYBRID)}",
        "",
    ]


def blends(quality: Quality) -> list[str]:
    """Return the sweep of `rerank_blend`, computed from the scores that one run's answers have of each stage."""
    lines = [
        "## `rerank_blend`",
        "",
        "The order that each weight gives, from the scores of each stage in the same answers: 0 is retrieval's order, 1 the "
        f"reranker's. The default is {quality.blend:g}. First the default's sets, then the means of the others.",
        "",
    ]
    others = [row for row in quality.rows() if row in quality.blends and row != DEFAULT]
    lines += _header("blend", [*quality.titles.values(), "mean", *others])
    for weight, by_set in sorted(quality.blends[DEFAULT].items()):
        means = [_three(fmean(quality.blends[row][weight].values())) for row in others]
        values = [*(_three(by_set[name]) for name in quality.titles), _three(fmean(by_set.values())), *means]
        lines.append(_line(f"{weight:g}", values))
    return [*lines, ""]


def tests(quality: Quality) -> list[str]:
    """Return the default beside every other row: differences and paired randomisation tests."""
    lines = [
        "## Paired tests",
        "",
        "The default's nDCG@10 less the other's on the same queries, and in brackets p of a two-sided paired randomisation "
        "test (10,000 rounds, seed fixed); last, for how many queries of all sets it is better, the same and worse.",
        "",
        *_header("the default less", [*quality.titles.values(), "mean", "better / same / worse"]),
    ]
    for row in quality.rows():
        if row == DEFAULT:
            continue
        groups = {name: _both(quality.values[DEFAULT], quality.values[row], name) for name in quality.titles}
        found = [compare([group]) for group in groups.values()]
        together = compare(list(groups.values()))
        cells = [f"{one.difference:+.3f} ({_p(one.p)})" for one in [*found, together]]
        lines.append(_line(row, [*cells, f"{together.better} / {together.equal} / {together.worse}"]))
    return [*lines, ""]


def _both(ours: Values, theirs: Values, name: str) -> tuple[list[float], list[float]]:
    return list(ours[name].values()), [theirs[name][query] for query in ours[name]]


def _header(first: str, others: Sequence[str]) -> list[str]:
    return [_line(first, others), "|---" * (1 + len(others)) + "|"]


def _line(first: str, others: Sequence[str]) -> str:
    return f"| {' | '.join([first, *others])} |"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}"


def _said(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"
