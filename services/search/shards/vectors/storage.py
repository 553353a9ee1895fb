"""The files of segments: written under a temporary name, synced, renamed, never changed; checked when they are loaded."""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from services.search.ports import Metric
from services.search.shards import files as disk
from services.search.shards.vectors.metrics import Vectors, faiss, faiss_metric
from services.search.shards.vectors.planning import Kind
from services.search.shards.vectors.segments import Segment

# The size and the SHA-256 of a file, as JSON values.
FileFacts = Mapping[str, Any]

_UNFINISHED = ".part"
_PIECE_BYTES = 4 << 20


def write_in_slices(path: Path, arrays: Iterable[NDArray[Any]], pace: Callable[[], None]) -> FileFacts:
    """Write *arrays* one after the other as a file; *pace* is called after each."""
    unfinished = _unfinished(path)
    with unfinished.open("wb") as file:
        writer = _Writer(file, pace)
        for array in arrays:
            writer(np.ascontiguousarray(array).data)
    return _finished(path, writer)


def write_array(path: Path, array: NDArray[Any]) -> FileFacts:
    """Write a small array as a file."""
    data = array.tobytes()
    disk.write_file(_unfinished(path), data)
    disk.rename(_unfinished(path), path)
    return {"sha256": sha256(data).hexdigest(), "bytes": len(data)}


def write_index(index: Any, path: Path, pace: Callable[[], None]) -> FileFacts:
    """Write a FAISS index as a file; *pace* is called after each piece of it."""
    unfinished = _unfinished(path)
    with unfinished.open("wb") as file:
        writer = _Writer(file, pace)
        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(writer, _PIECE_BYTES))
        except RuntimeError as error:
            raise OSError(f"{path.name} could not be written: {error}") from error
    return _finished(path, writer)


class _Writer:
    """Writes a file piece by piece, and knows its size and digest at the end without reading it again."""

    def __init__(self, file: BinaryIO, pace: Callable[[], None]) -> None:
        self._file = file
        self._pace = pace
        self._digest = sha256()
        self._bytes = 0

    def __call__(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        self._pace()

    @property
    def facts(self) -> FileFacts:
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}


def _finished(path: Path, writer: _Writer) -> FileFacts:
    disk.sync_file(_unfinished(path))
    disk.rename(_unfinished(path), path)
    return writer.facts


def remove_files(directory: Path, stem: str) -> None:
    """Remove all files of the segment *stem*, finished or not."""
    for path in directory.glob(f"{stem}.*"):
        disk.remove(path)


def check_files(directory: Path, files: Mapping[str, FileFacts]) -> None:
    """Raise Damaged, naming the file, unless all *files* are as they were written."""
    for name, facts in files.items():
        disk.check_file(directory / name, int(facts["bytes"]), str(facts["sha256"]))


def open_segment(
    directory: Path,
    dim: int,
    metric: Metric,
    kind: Kind,
    start: int,
    stop: int,
    count: int,
    parts: Mapping[str, str],
    files: Mapping[str, FileFacts],
) -> Segment:
    """Map a segment's files, whose contents have been checked. Raises Damaged where they do not fit together."""
    numbers = _mapped(directory / parts["rows"], np.uint32, (count,)) if "rows" in parts else None
    vectors: Vectors | None = None
    if "vectors" in parts:
        vectors = _mapped(directory / parts["vectors"], np.float32, (count, dim))
    index = _open_index(directory / parts["index"], kind, dim, metric, count) if "index" in parts else None
    if (vectors is None) != (kind == "codes") or (index is None) != (kind == "flat"):
        raise disk.Damaged(f"a segment of the kind {kind} has the wrong files: {', '.join(parts.values())}")
    if numbers is None and stop - start != count:
        raise disk.Damaged(f"the rows {start} to {stop} are not {count}: {', '.join(parts.values())}")
    return Segment(kind, metric, start, stop, numbers, vectors, index, dict(parts), dict(files))


def private_index(segment: Segment, directory: Path, pace: Callable[[], None]) -> Any:
    """Return a copy of a segment's index in the process's own memory, which may be changed. Raises OSError."""

    def read(count: int) -> bytes:
        pace()
        return file.read(count)

    path = directory / segment.parts["index"]
    with path.open("rb") as file:
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(read, _PIECE_BYTES))
        except RuntimeError as error:
            raise OSError(f"{path.name} cannot be read: {error}") from error


def read_tail(path: Path, dim: int, count: int) -> Vectors:
    """Return a tail's vectors, from a file whose contents have been checked."""
    return _mapped(path, np.float32, (count, dim))


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size
    if found != wanted:
        raise disk.Damaged(f"{path.name} has {found} bytes, expected {wanted}")
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)


def _open_index(path: Path, kind: Kind, dim: int, metric: Metric, count: int) -> Any:
    """Return the FAISS index in a file, with its codes and links mapped."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if kind == "ivf" else faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise disk.Damaged(f"{path.name} cannot be read: {error}") from error
    if (index.d, index.ntotal, index.metric_type) != (dim, count, faiss_metric(metric)):
        raise disk.Damaged(f"{path.name} has {index.ntotal} rows of dimension {index.d}, expected {count} of {dim}")
    if kind == "ivf":
        index.invlists.prefetch_nthread = 0  # Reading ahead would take threads of its own.
    return index


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + _UNFINISHED)
