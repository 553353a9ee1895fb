"""The files of segments: written under a temporary name, synced, renamed, never changed; checked when they are loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.search.ports import Metric
from services.search.shards import files as disk
from services.search.shards.vectors.metrics import Vectors, faiss, faiss_metric
from services.search.shards.vectors.planning import Kind
from services.search.shards.vectors.segments import Segment

_UNFINISHED = ".part"


def write_in_slices(path: Path, arrays: Iterable[NDArray[Any]], pace: Callable[[], None]) -> None:
    """Write *arrays* one after the other as a file."""
    unfinished = _unfinished(path)
    with unfinished.open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)
            pace()
    disk.sync_file(unfinished)
    disk.rename(unfinished, path)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a small array as a file."""
    disk.write_file(_unfinished(path), array.tobytes())
    disk.rename(_unfinished(path), path)


def write_index(index: Any, path: Path) -> None:
    """Write a FAISS index as a file."""
    unfinished = _unfinished(path)
    try:
        faiss.write_index(index, str(unfinished))
    except RuntimeError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error
    disk.sync_file(unfinished)
    disk.rename(unfinished, path)


def recorded(directory: Path, names: Sequence[str], pace: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Make the names of new files last, and return the size and SHA-256 of each."""
    disk.sync_directory(directory)
    found = {}
    for name in names:
        path = directory / name
        found[name] = {"sha256": disk.sha256_of(path), "bytes": path.stat().st_size}
        pace()
    return found


def remove_files(directory: Path, stem: str) -> None:
    """Remove all files of the segment *stem*, finished or not."""
    for path in directory.glob(f"{stem}.*"):
        disk.remove(path)


def check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
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
    files: Mapping[str, Mapping[str, Any]],
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
