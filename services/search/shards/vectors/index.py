"""
The vectors of one shard by row number.

Rows only grow. The newest are in a tail: a preallocated chunk whose filled part is published after each copy. A full
tail becomes a flat segment in memory at once; maintenance writes it to a file and merges segments into larger ones.
Readers take a view; nothing that they can see in it is moved or changed afterwards. Which rows are live is the
caller's knowledge and comes with each question.
"""

import threading
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyroaring import BitMap

from services.search.ports import Metric
from services.search.shards import files as disk
from services.search.shards.vectors import building, tiers
from services.search.shards.vectors.building import Built
from services.search.shards.vectors.codes import Pace
from services.search.shards.vectors.metrics import Vectors
from services.search.shards.vectors.planning import VectorOptions
from services.search.shards.vectors.segments import Segment
from services.search.shards.vectors.storage import check_files, open_segment, read_tail, write_array
from services.search.shards.vectors.tiers import Job
from services.search.shards.vectors.view import VectorView

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class _FrozenTail:
    start: int
    count: int
    name: str
    facts: Mapping[str, Any]


class VectorIndex:
    """
    Vectors by row number. One writer thread at a time calls `add`, `due`, `swap` and `freeze`; one builder `build`.

    A cosine index takes vectors of unit length. Scores are higher for what is nearer, see `VectorView`.
    """

    def __init__(self, dim: int, metric: Metric, directory: Path, options: VectorOptions) -> None:
        """Make an empty index whose segments' files will be in *directory*, which is made when it is needed."""
        self._dim = dim
        self._metric: Metric = metric
        self._directory = directory
        self._options = options
        self._sealed: tuple[Segment, ...] = ()
        self._tail_start = 0
        self._filled = 0
        self._chunk: Vectors = np.empty((0, dim), np.float32)
        self._frozen_tail: _FrozenTail | None = None
        self._lock = threading.Lock()
        self._making: set[str] = set()

    @classmethod
    def load(
        cls, dim: int, metric: Metric, directory: Path, options: VectorOptions, state: Mapping[str, Any]
    ) -> "VectorIndex":
        """Return the index that `freeze` returned *state* of. Raises Damaged, naming what is missing or altered."""
        index = cls(dim, metric, directory, options)
        try:
            index._load(state)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise disk.Damaged(f"the vectors' state cannot be read: {type(error).__name__}: {error}") from error
        return index

    def __len__(self) -> int:
        """Return the next row number."""
        return self._tail_start + self._filled

    def add(self, first_row: int, vectors: Vectors) -> None:
        """
        Append *vectors* (shape [n, dim]) as rows *first_row*, *first_row* + 1, …; later views have them all.

        Raises:
            ValueError: *first_row* is not the next row, or the shape is wrong.
        """
        if first_row != len(self):
            raise ValueError(f"row {first_row} is not the next row, {len(self)}")
        if vectors.ndim != 2 or vectors.shape[1] != self._dim:
            raise ValueError(f"vectors have shape {vectors.shape}, expected [n, {self._dim}]")
        done = 0
        while done < len(vectors):
            if not len(self._chunk):
                self._chunk = np.empty((self._options.tail_rows, self._dim), np.float32)
            part = vectors[done : done + len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if self._filled == len(self._chunk):
                self._seal()

    def view(self) -> VectorView:
        """Return the index as it is now; call it in the writer's thread."""
        segments = self._sealed
        if self._filled:
            stop = self._tail_start + self._filled
            tail = Segment("flat", self._metric, self._tail_start, stop, None, self._chunk[: self._filled])
            segments = (*segments, tail)
        return VectorView(self._dim, self._metric, segments, self._options)

    def due(self, live: BitMap, *, idle: bool) -> Job | None:
        """
        Return what maintenance should do now: seal, rebuild what is dead to a fifth, merge (into one when *idle*).

        Call it in the writer's thread. An *idle* index seals its tail too, once comparing with its rows one by one costs more
        than having them in the graph.
        """
        if idle and tiers.tail_is_due(self._filled, self._sealed, self._options):
            self._seal()
        return tiers.due(self._sealed, live, self._options, idle=idle)

    def build(self, job: Job, live: BitMap, pace: Pace) -> Built:
        """
        Make what takes the place of *job*'s segments, with those of their rows that are *live*; its files are synced.

        Calls *pace* after each short step; whatever that raises ends the work, and no file is left.
        """
        stem = self._new_stem()
        built = Built(None)
        try:
            built = building.build(job, live, pace, self._directory, stem, self._dim, self._metric, self._options)
        finally:
            if built.segment is None:
                self._forget_stem(stem)
        return built

    def swap(self, job: Job, built: Built) -> None:
        """Let later views have what was built; where the job's segments are not there any more, nothing changes."""
        places = [at for at, segment in enumerate(self._sealed) if segment is job.segments[0]]
        if places and self._sealed[places[0] : places[0] + len(job.segments)] == job.segments:
            new = () if built.segment is None else (built.segment,)
            self._sealed = (*self._sealed[: places[0]], *new, *self._sealed[places[0] + len(job.segments) :])
        if built.segment is not None:
            self._forget_stem(next(iter(built.segment.files)).partition(".")[0])

    def freeze(self) -> tuple[dict[str, Any], list[str]]:
        """
        Return the state as JSON values and the names of the files, all immutable, that it refers to.

        What is only in memory is written first. Raises OSError; the index is as it was then.
        """
        stems: list[str] = []
        try:
            self._sealed = tuple(part if part.files else self._written(part, stems) for part in self._sealed)
            tail = self._freeze_tail(stems)
        finally:
            for stem in stems:
                self._forget_stem(stem)
        files = {name: dict(facts) for segment in self._sealed for name, facts in segment.files.items()}
        if tail is not None:
            files[tail.name] = dict(tail.facts)
        state = {
            "format": _FORMAT,
            "dim": self._dim,
            "metric": self._metric,
            "rows": len(self),
            "segments": [
                {
                    "kind": segment.kind,
                    "start": segment.start,
                    "stop": segment.stop,
                    "count": len(segment),
                    "parts": dict(segment.parts),
                }
                for segment in self._sealed
            ],
            "tail": None if tail is None else {"start": tail.start, "count": tail.count, "file": tail.name},
            "files": files,
        }
        return state, list(files)

    def collect(self, keep: Collection[str]) -> None:
        """Delete the files in the directory that neither the index nor *keep* needs; views in use keep theirs."""
        if not self._directory.is_dir():
            return
        with self._lock:
            present = sorted(self._directory.iterdir())
            making = set(self._making)
            needed = {*keep, *(name for segment in self._sealed for name in segment.files)}
            if self._frozen_tail is not None:
                needed.add(self._frozen_tail.name)
        for path in present:
            if path.name not in needed and path.name.partition(".")[0] not in making:
                disk.remove(path)

    @property
    def memory_bytes(self) -> int:
        """How much of the process's own memory the vectors take; what is mapped from files is not in it."""
        return sum(segment.memory_bytes for segment in self._sealed) + self._filled * self._dim * 4

    @property
    def disk_bytes(self) -> int:
        """How many bytes the files of the segments have."""
        return sum(int(facts["bytes"]) for segment in self._sealed for facts in segment.files.values())

    def segments(self) -> Mapping[str, int]:
        """Return how many rows, live or not, are in segments of each kind; the tail's are `tail`."""
        rows: dict[str, int] = {"tail": self._filled} if self._filled else {}
        for segment in self._sealed:
            rows[segment.kind] = rows.get(segment.kind, 0) + len(segment)
        return rows

    def _seal(self) -> None:
        stop = self._tail_start + self._filled
        segment = Segment("flat", self._metric, self._tail_start, stop, None, self._chunk[: self._filled])
        self._sealed = (*self._sealed, segment)
        self._tail_start, self._filled = stop, 0
        self._chunk = np.empty((0, self._dim), np.float32)
        self._frozen_tail = None

    def _written(self, segment: Segment, stems: list[str]) -> Segment:
        assert segment.vectors is not None
        name, facts = self._write_vectors(segment.vectors, stems)
        return open_segment(
            self._directory,
            self._dim,
            self._metric,
            "flat",
            segment.start,
            segment.stop,
            len(segment),
            {"vectors": name},
            {name: facts},
        )

    def _freeze_tail(self, stems: list[str]) -> _FrozenTail | None:
        if not self._filled:
            return None
        frozen = self._frozen_tail
        if frozen is None or frozen.count != self._filled:
            name, facts = self._write_vectors(self._chunk[: self._filled], stems)
            self._frozen_tail = frozen = _FrozenTail(self._tail_start, self._filled, name, facts)
        return frozen

    def _write_vectors(self, vectors: Vectors, stems: list[str]) -> tuple[str, Mapping[str, Any]]:
        """Write *vectors* as a file, which `collect` leaves alone until its name, added to *stems*, is forgotten."""
        stems.append(self._new_stem())
        name = f"{stems[-1]}.f32"
        facts = write_array(self._directory / name, vectors)
        disk.sync_directory(self._directory)
        return name, facts

    def _new_stem(self) -> str:
        """Return a name that no file has had, also not in an earlier life of this directory."""
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = uuid.uuid4().hex[:16]
        with self._lock:
            self._making.add(stem)
        return stem

    def _forget_stem(self, stem: str) -> None:
        with self._lock:
            self._making.discard(stem)

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["format"] != _FORMAT or (state["dim"], state["metric"]) != (self._dim, self._metric):
            found = f"format {state['format']}, dimension {state['dim']}, metric {state['metric']}"
            raise disk.Damaged(f"the vectors have {found}; expected {_FORMAT}, {self._dim}, {self._metric}")
        files = state["files"]
        check_files(self._directory, files)
        loaded, stop = [], 0
        for saved in state["segments"]:
            if not stop <= saved["start"] < saved["stop"]:
                raise disk.Damaged(f"segments overlap at row {saved['start']}")
            stop = saved["stop"]
            parts = saved["parts"]
            facts = {name: files[name] for name in parts.values()}
            shape = saved["kind"], saved["start"], stop, saved["count"]
            loaded.append(open_segment(self._directory, self._dim, self._metric, *shape, parts, facts))
        self._sealed = tuple(loaded)
        tail = state["tail"]
        self._tail_start = state["rows"] if tail is None else tail["start"]
        if self._tail_start < stop:
            raise disk.Damaged(f"segments overlap at row {self._tail_start}")
        if tail is not None:
            self.add(tail["start"], read_tail(self._directory / tail["file"], self._dim, tail["count"]))
        if len(self) != state["rows"]:
            raise disk.Damaged(f"the vectors have {len(self)} rows, expected {state['rows']}")
