"""Sealing, merging and rebuilding: what is due, and how a new segment and its files are made of old ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyroaring import BitMap

from services.search.ports import Metric
from services.search.shards import files as disk
from services.search.shards.vectors.codes import Bounds, Pace, add_to_graph, bounds_of, build_index, clamped_share
from services.search.shards.vectors.metrics import Rows, Vectors, use_one_thread
from services.search.shards.vectors.planning import Kind, VectorOptions
from services.search.shards.vectors.segments import Segment, slices
from services.search.shards.vectors.storage import (
    FileFacts,
    open_segment,
    private_index,
    remove_files,
    write_in_slices,
    write_index,
)
from services.search.shards.vectors.tiers import Job

_Sources = list[tuple[Segment, Rows]]

_READ_ROWS = 4096

# With more dead rows a graph is not extended but built anew without them.
_DEAD_KEPT = 0.1

# How much larger than the squared error of rounding new rows' values to a byte that of cutting them off at a graph's
# bounds may be. Bounds of the first 16,384 of 60,000 rows make it 0.1, of 4,096 0.9, of 600 11, of 60 320, and the ten
# best by codes have .990, .990, .982 and .922 of the ten nearest; all of these are among the twenty best (60: .998).
_CLAMPED_SHARE = 10.0


@dataclass(frozen=True, slots=True)
class Built:
    """What takes the place of a job's segments; None when all of their rows were dead."""

    segment: Segment | None


def build(
    job: Job, live: BitMap, pace: Pace, directory: Path, stem: str, dim: int, metric: Metric, options: VectorOptions
) -> Built:
    """
    Write the files of the new segment, all named *stem* and a suffix, and open it; memory is bounded by its index.

    A graph that comes first in a merge is extended, and keeps its dead rows. Whatever is raised, by *pace* for one, no
    file is left behind.
    """
    use_one_thread()
    live = BitMap(live)
    sources = [(segment, segment.live(live)) for segment in job.segments]
    count = sum(len(positions) for _, positions in sources)
    if not count:
        return Built(None)
    kind: Kind = "flat" if job.purpose == "seal" and not options.compact else options.kind(count)
    extended = _extended(sources, kind, pace)
    if extended is not None:
        sources[0] = extended, np.arange(len(extended))
    try:
        return Built(_Build(directory, stem, dim, metric, options, pace).write(sources, kind, extended))
    except BaseException:
        remove_files(directory, stem)
        raise


def _extended(sources: _Sources, kind: Kind, pace: Pace) -> Segment | None:
    """Return the first segment if its graph may be had for the new one by adding the rows of the others."""
    (first, live), *others = sources
    if not others or (kind, first.kind) != ("hnsw", "hnsw") or len(first) - len(live) > _DEAD_KEPT * len(first):
        return None
    return first if clamped_share(first.index, _each(others, pace)) <= _CLAMPED_SHARE else None


def _each(sources: _Sources, pace: Pace) -> Iterator[Vectors]:
    for segment, positions in sources:
        for part in slices(segment, positions, _READ_ROWS):
            yield part
            pace()


@dataclass(frozen=True, slots=True)
class _Build:
    """Where and how one segment is written."""

    directory: Path
    stem: str
    dim: int
    metric: Metric
    options: VectorOptions
    pace: Pace

    def write(self, sources: _Sources, kind: Kind, extended: Segment | None) -> Segment:
        """Write and open a segment of the rows of *sources*, of which *extended* has the first in its graph."""
        start, stop = sources[0][0].start, sources[-1][0].stop
        count = sum(len(positions) for _, positions in sources)
        parts: dict[str, str] = {}
        files: dict[str, FileFacts] = {}

        def note(role: str, suffix: str) -> Path:
            parts[role] = f"{self.stem}.{suffix}"
            return self.directory / parts[role]

        if count < stop - start:
            numbers = (segment.rows(positions).astype("<u4") for segment, positions in sources)
            path = note("rows", "rows")
            files[path.name] = write_in_slices(path, numbers, self.pace)
        read: Callable[[int], Iterator[Vectors]]
        if kind == "codes":

            def from_sources(rows: int) -> Iterator[Vectors]:
                for segment, positions in sources:
                    yield from slices(segment, positions, rows)

            read = from_sources
        else:
            path = note("vectors", "f32")
            files[path.name] = write_in_slices(path, _each(sources, lambda: None), self.pace)
            written: Vectors = np.memmap(path, np.float32, "r", shape=(count, self.dim)).view(np.ndarray)

            def from_file(rows: int) -> Iterator[Vectors]:
                for at in range(0 if extended is None else len(extended), count, rows):
                    yield written[at : at + rows]

            read = from_file
        if kind != "flat":
            path = note("index", "faiss")
            index = self._index(sources, kind, extended, count, read)
            files[path.name] = write_index(index, path, self.pace)
            del index
        disk.sync_directory(self.directory)
        return open_segment(self.directory, self.dim, self.metric, kind, start, stop, count, parts, files)

    def _index(
        self,
        sources: _Sources,
        kind: Kind,
        extended: Segment | None,
        count: int,
        read: Callable[[int], Iterator[Vectors]],
    ) -> Any:
        if extended is not None:
            index = private_index(extended, self.directory, self.pace)
            add_to_graph(index, count, read, self.pace)
            return index
        bounds = _bounds(sources, self.dim, self.pace)
        return build_index(kind, self.metric, bounds, count, read, self.options, self.pace)


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
