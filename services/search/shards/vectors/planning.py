"""
Which kind of segment a number of rows gets, and how a segment is searched for a number of allowed rows.

The thresholds are measured: 384 dimensions, clustered vectors, top 10, one thread of a Zen 5 at 100k and 1M rows.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["flat", "hnsw", "ivf", "codes"]
Way = Literal["gather", "flat", "scan", "beam"]

# 1,000 float32 rows are gathered and scored in 0.07 ms; a scan of codes looks at every row's bit (1.8 ns each).
_GATHERED_ROWS = 1024
_GATHERED_SHARE = 1 / 50

# With fewer allowed rows a beam loses its way (recall at a beam of 64 and 100k rows: 1.00 at a share of 0.2, .92 at
# 0.1, .61 at .05; eight times the beam, 1 ms, gives .98 and .85, and at 1M rows .93 and .68), while a scan of the
# allowed rows' codes misses nothing: 0.65 ms at a share of 0.1 of 100k rows, but 20 ms of 1M.
_BEAM_SHARE = 0.2

# A larger graph needs a wider beam, the more so the more rows are alike. Of 1M rows in 10,000 clusters 96 finds .951 of
# the nearest in 0.49 ms, 128 .971, 160 .976 and 256 .991; of 1M rows in 1,000 clusters 141 finds .931 in 0.67 ms. Twice
# as wide for ten times the rows (191 for 1M) is enough for both.
_BEAM_ROWS = 100_000
_BEAM_GROWTH = 0.3

# Among so many allowed rows the few others are dropped from the answer instead of being kept out of the search.
_UNSELECTED_SHARE = 0.98

# Inner products of vectors whose lengths differ: neighbours are not mutual then. With lengths spread by a log-normal
# of sigma 0.5, recall is .942 at 64 and .971 at 256 (40k rows). With the usual extra dimension that turns them into
# distances, coded in a byte like the others, it was .16: which of the two is to blame was not looked into.
_DOT_WIDENING = 4


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """
    How an index keeps its rows. Segments of less than *hnsw_rows* are scanned; from *ivf_rows* they are lists.

    Building a graph costs 6,000 rows/s at 100k rows and 3,000 at 1M (M 16, efConstruction 80); *ef_search* 96 finds
    1.00 of the nearest in 0.14 ms at 100k, and is widened for more. A *compact* index keeps codes of one byte for
    each dimension and neither float32 vectors nor graphs: its scores are approximate, and every search is a scan.
    """

    tail_rows: int = 4096
    hnsw_rows: int = 16_384
    ivf_rows: int = 2_000_000
    max_segment_rows: int = 8_000_000
    ef_search: int = 96
    hnsw_links: int = 16
    ef_construction: int = 80
    dead_share: float = 0.2
    compact: bool = False

    def kind(self, rows: int) -> Kind:
        """Return the kind of a sealed segment of *rows*."""
        if self.compact:
            return "codes"
        if rows < self.hnsw_rows:
            return "flat"
        return "hnsw" if rows < self.ivf_rows else "ivf"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to search one segment. *fetch* candidates are rescored; *selected*: others are kept out of the search."""

    way: Way
    fetch: int = 0
    beam: int = 0
    widened: bool = False
    selected: bool = False


def plan_segment(
    kind: Kind, rows: int, allowed: int, limit: int, options: VectorOptions, *, dot: bool, exact: bool
) -> Plan:
    """Return how to find the best *limit* of the *allowed* (at least one) of a segment's *rows*."""
    if kind == "codes":
        return Plan("scan", min(limit, allowed), selected=allowed < rows)
    if exact or kind == "flat" or allowed <= max(_GATHERED_ROWS, rows * _GATHERED_SHARE):
        return Plan("gather" if allowed < rows / 8 else "flat")
    # A fifth more than asked for is enough to make good what one byte for a dimension confuses.
    fetch = min(limit * 5 // 4 + 5, allowed)
    share = allowed / rows
    if share < _BEAM_SHARE:
        return Plan("scan", fetch, selected=True)
    wide = max(1.0, rows / _BEAM_ROWS) ** _BEAM_GROWTH
    beam = max(math.ceil(options.ef_search * wide), fetch * 3 // 2) * (_DOT_WIDENING if dot else 1)
    selected = share < _UNSELECTED_SHARE
    if not selected:
        return Plan("beam", fetch + min(math.ceil(fetch * (1 - share)), rows - allowed), beam)
    return Plan("beam", fetch, math.ceil(beam * min(2.0, 0.5 / share)) if share < 0.5 else beam, share < 0.5, True)
