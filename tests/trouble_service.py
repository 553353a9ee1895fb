"""A search process with small segments, its documents, and what it holds of memory, threads and files."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.search_process import SearchProcess

DIM = 8

# So small that a few hundred documents are sealed, merged and written to snapshots.
SMALL = {"SEARCH_TAIL_ROWS": "64", "SEARCH_HNSW_ROWS": "300", "SEARCH_MAINTENANCE_SHARE": "1"}


def vector_of(number: int, version: int = 0) -> list[float]:
    """Return a unit vector that only this version of a document has."""
    vector = np.random.default_rng([number, version]).standard_normal(DIM)
    found: list[float] = (vector / np.linalg.norm(vector)).tolist()
    return found


def document(number: int, version: int = 0, **fields: Any) -> dict[str, Any]:
    """Return document `d<number>`, with a word and a vector that only this version has."""
    return {
        "id": f"d{number}",
        "text": f"word{number}x{version} and some more",
        "metadata": {"number": number, "version": version},
        "vector": vector_of(number, version),
        **fields,
    }


class TroubledService(SearchProcess):
    """A search process whose segments are small."""

    def __init__(self, data_dir: Path, log: Path | None = None, **environ: str) -> None:
        super().__init__(data_dir, log, **{**SMALL, **environ})

    def search(self, number: int, version: int = 0, collection: str = "c", **options: Any) -> Any:
        """Return the answer to a hybrid search for one version of a document by its word and its vector."""
        question = {"query": f"word{number}x{version}", "query_vector": vector_of(number, version), "k": 1}
        question |= {"collection": collection, "rerank": False, "cache": False}
        return self.ask("POST", "/search", question | options)

    def write(self, numbers: Sequence[int], version: int = 0, *, wait: str = "applied", collection: str = "c") -> Any:
        """Write documents of one version; return the reply to the last batch."""
        answer = None
        for start in range(0, len(numbers), 500):
            documents = [document(number, version) for number in numbers[start : start + 500]]
            answer = self.ask("POST", f"/collections/{collection}/documents?wait={wait}", {"documents": documents})
            assert answer["accepted"] == len(documents), answer
        return answer

    # --- what it holds

    @property
    def rss_bytes(self) -> int:
        """The memory that is resident now."""
        with open(f"/proc/{self.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

    @property
    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    @property
    def open_files(self) -> int:
        """How many file handles it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def searching(data_dir: Path, **environ: str) -> Iterator[TroubledService]:
    """Run the service on *data_dir*, its log beside that, and yield it; whatever runs at the end is killed."""
    service = TroubledService(data_dir, **environ)
    service.start()
    try:
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.kill()


def until(holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until *holds()*; fail where it does not."""
    give_up_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up_at, "it never came about"
        time.sleep(0.05)
