"""The newest documents of a lexical index, in memory until they are folded into the one on the disk."""

from collections.abc import Callable

import tantivy
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.shards.lexical.engine import MeanLength, add_ballast, document_of, open_index, term_count
from services.search.shards.lexical.scoring import Part

_HEAP_BYTES = 15_000_000
# So many documents of average length make the average of a few others not matter; they are added in 25 ms.
_BALLAST = 2048
# The average length is weighed over the first documents, and every so many of all others.
_WEIGHED, _WEIGH_EVERY = 200, 8
# Measured over 16,000 documents of 60 words, with what the writer holds.
_BYTES_PER_DOCUMENT = 2000


class MemoryPart:
    """
    Documents under rows that only grow. For one thread at a time; `Part`s that were taken do not change.

    Every method raises BackendFailed when Tantivy's writer fails; what was not committed is then lost, and the next
    call begins with a new writer. *length* is that of the documents that were added, by a sample of them.
    """

    def __init__(self, language: str, beside: MeanLength) -> None:
        """Score as in one index with documents that are of the length *beside*."""
        self._index = open_index(language)
        self._language = language
        self._beside = beside
        self.length = MeanLength()
        self._ballast = 0
        self._writer: tantivy.IndexWriter | None = None
        self._uncommitted: list[int] = []
        self.rows = BitMap()
        self.part = Part(self._index.searcher(), self.rows)

    @property
    def memory_bytes(self) -> int:
        """What it takes, roughly."""
        return len(self.rows) * _BYTES_PER_DOCUMENT

    @property
    def changed(self) -> bool:
        """Whether there is something that was not committed."""
        return bool(self._uncommitted)

    def add(self, row: int, title: str | None, text: str) -> None:
        """Add a document under *row*, which is new."""
        if self._beside.documents and not self._ballast:
            self._write(lambda writer: add_ballast(writer, _BALLAST, self._beside))
            self._write(lambda writer: writer.commit())
            self._ballast = _BALLAST
        self._write(lambda writer: writer.add_document(document_of(row, title, text)))
        self._uncommitted.append(row)
        if self.length.documents < _WEIGHED or row % _WEIGH_EVERY == 0:
            self.length += MeanLength(term_count(title, text, self._language), 1)

    def commit(self) -> None:
        """Let `part` have all that was added."""
        if not self._uncommitted:
            return
        self._write(lambda writer: writer.commit())
        self._index.reload()
        self.rows = self.rows | BitMap(self._uncommitted)
        self._uncommitted.clear()
        self.part = Part(self._index.searcher(), self.rows, self._ballast)

    def rollback(self) -> None:
        """Forget what was not committed."""
        if self._uncommitted:
            self._write(lambda writer: writer.rollback())
            self._uncommitted.clear()

    def rest(self) -> None:
        """End the writer's threads, and free its memory, until something is added again."""
        if self._writer is not None and not self._uncommitted:
            writer, self._writer = self._writer, None
            writer.wait_merging_threads()

    def _write(self, step: Callable[[tantivy.IndexWriter], object]) -> None:
        try:
            if self._writer is None:
                # Made when it is first needed: it has threads and a heap, and many shards are empty.
                self._writer = self._index.writer(heap_size=_HEAP_BYTES, num_threads=1)
            step(self._writer)
        except Exception as error:
            self._writer = None
            self._uncommitted.clear()
            raise BackendFailed(f"The lexical index could not be written: {error}") from error
