"""
What maintenance should do next: seal, rebuild, or merge; which segments are merged, and when.

Sizes of segments fall from the oldest to the newest, each about an eighth of the one before or less. A merge reaches
back as long as that holds, so a row is added to a graph once for each factor of 8 between the newest segments and all
(twice at most at 1M rows, three times at 8M); what a merge only copies is cheap beside that.
"""

from dataclasses import dataclass
from typing import Literal

from pyroaring import BitMap

from services.search.shards.vectors.planning import VectorOptions
from services.search.shards.vectors.segments import Segment

# So many flat segments are searched one by one before they go into a graph: 2.5 ms of scanning.
_FLAT_SEGMENTS = 4
_TIER = 8

# With nothing else to do all become one, but not a big one again and again for the sake of every few rows.
_WORTH_MERGING = 1 / 128

# Lists are not extended: all of their rows are put into new ones.
_LISTS_TIER = 2
_WORTH_NEW_LISTS = 1 / 16


@dataclass(frozen=True, slots=True)
class Job:
    """Make one segment of *segments*, which are neighbours, as *purpose* says."""

    purpose: Literal["seal", "merge", "rebuild"]
    segments: tuple[Segment, ...]


def due(segments: tuple[Segment, ...], live: BitMap, options: VectorOptions, *, idle: bool) -> Job | None:
    """Return what should be done first: write what is only in memory, drop dead rows, merge."""
    unwritten = tuple(segment for segment in segments if not segment.files)
    if unwritten:
        return Job("seal", unwritten)
    for segment in segments:
        dead = len(segment) - segment.allowed(live)
        if dead >= max(1, len(segment) * options.dead_share):
            return Job("rebuild", (segment,))
    newest = _newest(segments, options)
    if newest is not None:
        return newest
    for segment in segments:
        # What shrank below a threshold keeps its kind, or a segment near it would be built again and again.
        if segment.kind == "flat" and options.kind(segment.allowed(live)) != "flat":
            return Job("rebuild", (segment,))
    return _all(segments, options) if idle else None


def tail_is_due(rows: int, segments: tuple[Segment, ...], options: VectorOptions) -> bool:
    """Whether a tail of so many rows, no longer growing, is worth a place in what *segments* are merged into."""
    largest = max(map(len, segments), default=0)
    return largest >= options.hnsw_rows and rows >= largest * _worth(largest + rows, options)


def _worth(rows: int, options: VectorOptions) -> float:
    """Return from which share of the largest segment others are merged with it, *rows* in all."""
    return _WORTH_NEW_LISTS if options.kind(rows) == "ivf" else _WORTH_MERGING


def _newest(segments: tuple[Segment, ...], options: VectorOptions) -> Job | None:
    """Return a merge of the newest small segments, once they are enough, with those before that are not too big for it."""
    enough_rows = max(options.hnsw_rows, _FLAT_SEGMENTS * options.tail_rows)
    small: list[Segment] = []
    for segment in reversed(segments):
        if segment.kind != "flat" and not (options.compact and len(segment) < enough_rows):
            break
        small.insert(0, segment)
    total = sum(map(len, small))
    if len(small) < _FLAT_SEGMENTS and total < enough_rows:
        return None
    first = len(segments) - len(small)
    while first:
        before = len(segments[first - 1])
        if before > total * (_LISTS_TIER if options.kind(before + total) == "ivf" else _TIER):
            break
        first -= 1
        total += before
    chosen = segments[first:]
    while total > options.max_segment_rows:
        total -= len(chosen[0])
        chosen = chosen[1:]
    return Job("merge", chosen) if len(chosen) > 1 else None


def _all(segments: tuple[Segment, ...], options: VectorOptions) -> Job | None:
    """Return a merge of the longest run of neighbours that fits into one segment and is worth it."""
    chosen: tuple[Segment, ...] = ()
    for first in range(len(segments)):
        total = largest = 0
        for last in range(first, len(segments)):
            total += len(segments[last])
            largest = max(largest, len(segments[last]))
            if total > options.max_segment_rows:
                break
            if last - first >= max(1, len(chosen)) and total - largest >= largest * _worth(total, options):
                chosen = segments[first : last + 1]
    return Job("merge", chosen) if chosen else None
