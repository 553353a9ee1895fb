"""Sealing, merging and rebuilding: what is due, and how a new segment and its files are made of old ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pyroaring import BitMap

from services.search.ports import Metric
from services.search.shards.vectors.codes import Bounds, Pace, bounds_of, build_index
from services.search.shards.vectors.metrics import Rows, Vectors, use_one_thread
from services.search.shards.vectors.planning import Kind, VectorOptions
from services.search.shards.vectors.segments import Segment, slices
from services.search.shards.vectors.storage import open_segment, recorded, remove_files, write_in_slices, write_index

_READ_ROWS = 4096

# As many segments of like size are merged into one while rows are still coming, so that a row is copied some
# log4(rows / tail) times in its life.
_LIKE_SIZED = 4
_TIER = 2

# With nothing else to do all become one, but not a big one again and again for the sake of every few rows.
_WORTH_MERGING = 1 / 32


@dataclass(frozen=True, slots=True)
class Job:
    """Make one segment of *segments*, which are neighbours, as *purpose* says."""

    purpose: Literal["seal", "merge", "rebuild"]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """What takes the place of a job's segments; None when all of their rows were dead."""

    segment: Segment | None


def due(segments: tuple[Segment, ...], live: BitMap, options: VectorOptions, *, idle: bool) -> Job | None:
    """Return what should be done first: write what is only in memory, drop dead rows, merge."""
    unwritten = tuple(segment for segment in segments if not segment.files)
    if unwritten:
        return Job("seal", unwritten)
    for segment in segments:
        count = segment.allowed(live)
        wanted = options.kind(count)
        if len(segment) - count >= max(1, len(segment) * options.dead_share):
            return Job("rebuild", (segment,))
        # What shrank below a threshold keeps its kind, or a segment near it would be built again and again.
        if segment.kind == "flat" and wanted != "flat":
            merged = _suffix(segments, options)
            return merged if merged and segment in merged.segments else Job("rebuild", (segment,))
    return _all(segments, options) if idle else _suffix(segments, options)


def _suffix(segments: tuple[Segment, ...], options: VectorOptions) -> Job | None:
    """Return a merge of the newest segments that are each at most *_TIER* times what is newer, if they are enough."""
    run: list[Segment] = []
    total = 0
    for segment in reversed(segments):
        if (run and len(segment) > _TIER * total) or total + len(segment) > options.max_segment_rows:
            break
        run.insert(0, segment)
        total += len(segment)
    return Job("merge", tuple(run)) if len(run) >= _LIKE_SIZED else None


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
            if last - first >= max(1, len(chosen)) and total - largest >= largest * _WORTH_MERGING:
                chosen = segments[first : last + 1]
    return Job("merge", chosen) if chosen else None


def build(
    job: Job, live: BitMap, pace: Pace, directory: Path, stem: str, dim: int, metric: Metric, options: VectorOptions
) -> Built:
    """
    Write the files of the new segment, all named *stem* and a suffix, and open it; memory is bounded by its codes.

    Whatever is raised, by *pace* for one, no file is left behind.
    """
    use_one_thread()
    live = BitMap(live)
    sources = [(segment, segment.live(live)) for segment in job.segments]
    count = sum(len(positions) for _, positions in sources)
    if not count:
        return Built(None)
    kind: Kind = "flat" if job.purpose == "seal" and not options.compact else options.kind(count)
    try:
        return Built(_write(sources, kind, count, pace, directory, stem, dim, metric, options))
    except BaseException:
        remove_files(directory, stem)
        raise


def _write(
    sources: list[tuple[Segment, Rows]],
    kind: Kind,
    count: int,
    pace: Pace,
    directory: Path,
    stem: str,
    dim: int,
    metric: Metric,
    options: VectorOptions,
) -> Segment:
    start, stop = sources[0][0].start, sources[-1][0].stop
    parts: dict[str, str] = {}
    numbers = np.concatenate([segment.rows(positions) for segment, positions in sources]).astype("<u4")
    if count < stop - start:
        parts["rows"] = f"{stem}.rows"
        write_in_slices(directory / parts["rows"], [numbers], pace)

    def from_sources(rows: int) -> Iterator[Vectors]:
        for segment, positions in sources:
            yield from slices(segment, positions, rows)

    read: Callable[[int], Iterator[Vectors]] = from_sources
    if kind != "codes":
        parts["vectors"] = f"{stem}.f32"
        path = directory / parts["vectors"]
        write_in_slices(path, from_sources(_READ_ROWS), pace)
        written: Vectors = np.memmap(path, np.float32, "r", shape=(count, dim)).view(np.ndarray)

        def from_file(rows: int) -> Iterator[Vectors]:
            for at in range(0, count, rows):
                yield written[at : at + rows]

        read = from_file
    if kind != "flat":
        bounds = _bounds(sources, dim, pace)
        index = build_index(kind, metric, bounds, count, read, options, pace)
        parts["index"] = f"{stem}.faiss"
        pace()
        write_index(index, directory / parts["index"])
        del index
    files = recorded(directory, list(parts.values()), pace)
    return open_segment(directory, dim, metric, kind, start, stop, count, parts, files)


def _bounds(sources: list[tuple[Segment, Rows]], dim: int, pace: Pace) -> Bounds:
    """
    Return the least and the greatest value in each dimension.

    Codes are decoded and coded again between the bounds that they had: with the same ones nothing is lost by it.
    """
    least, greatest = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
    for segment, positions in sources:
        if segment.kind == "codes":
            low, high = bounds_of(segment.index)
            least, greatest = np.minimum(least, low), np.maximum(greatest, high)
            continue
        for part in slices(segment, positions, _READ_ROWS):
            least, greatest = np.minimum(least, part.min(0)), np.maximum(greatest, part.max(0))
            pace()
    return least, greatest
