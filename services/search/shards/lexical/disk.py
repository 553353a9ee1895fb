"""The bulk of a lexical index: a Tantivy index in a directory, changed only by folds, and frozen by hard links."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tantivy
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.shards import files
from services.search.shards.files import Damaged
from services.search.shards.lexical.engine import (
    MANAGED,
    META,
    ROW,
    MeanLength,
    document_of,
    open_index,
    schema,
)
from services.search.shards.lexical.scoring import Part

Read = Callable[[Sequence[int]], Iterable[tuple[int, str | None, str]]]

_FORMAT = 1
_HEAP_BYTES = 30_000_000
_CHUNK_ROWS = 200


@dataclass(frozen=True, slots=True)
class Stored:
    """
    A commit: what can be searched, and what it takes to freeze it.

    *meta* is the commit's meta.json, *files* are the size and hash of all others that it names, which stay as they are
    for as long as *part* is there. *length* is that of its documents.
    """

    part: Part
    meta: bytes = b""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    length: MeanLength = field(default_factory=MeanLength)

    @property
    def rows(self) -> BitMap:
        """The rows that are in it."""
        return self.part.rows


class DiskIndex:
    """Writes commits, one thread at a time. Nothing is open between them but the files that are searched."""

    def __init__(self, directory: Path, language: str) -> None:
        """Start, or go on, in *directory*."""
        self._directory = directory
        self._language = language
        self._index = open_index(language, directory)

    def part(self, rows: BitMap) -> Part:
        """Return what is committed now, which is *rows*."""
        return Part(self._index.searcher(), rows)

    def fold(
        self, before: Stored, rows: BitMap, dead: BitMap, read: Read, pace: Callable[[], None], *, again: bool
    ) -> Stored:
        """
        Return *before* with *rows*, as *read* has them, and without *dead*, committed and synced.

        *again* says that the same was tried before, and may have been committed. Raises what *pace* and *read* raise,
        and BackendFailed; nothing has then changed for searches.
        """
        try:
            writer = self._index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        except Exception as error:
            raise BackendFailed(f"The lexical index could not be opened for writing: {error}") from error
        added = BitMap()
        try:
            unwanted = dead | rows if again else dead
            if unwanted:
                writer.delete_documents_by_query(tantivy.Query.term_set_query(schema, ROW, list(unwanted)))
            for chunk in _chunks(list(rows)):
                for row, title, text in read(chunk):
                    writer.add_document(document_of(row, title, text))
                    added.add(row)
                pace()
            writer.commit()
            writer.wait_merging_threads()
            self._index.reload()
        except ValueError as error:
            raise BackendFailed(f"The lexical index could not be written: {error}") from error
        finally:
            del writer  # what was not committed goes with it, and so do its threads
        return self._committed(before, (before.rows - dead) | added, pace)

    def _committed(self, before: Stored, rows: BitMap, pace: Callable[[], None]) -> Stored:
        part = self.part(rows)
        meta = (self._directory / META).read_bytes()
        found: dict[str, tuple[int, str]] = {}
        for name in _named(meta, self._directory):
            path = self._directory / name
            found[name] = before.files.get(name) or (path.stat().st_size, files.sha256_of(path))
            pace()
        return Stored(part, meta, found, before.length)

    def freeze(self, stored: Stored, target: Path) -> dict[str, Any]:
        """Give the files of *stored* second names in *target*, synced, and return what `thaw` needs to know."""
        target.mkdir(parents=True, exist_ok=True)
        marks = dict(stored.files)
        if stored.meta:
            for name in stored.files:
                files.hard_link(self._directory / name, target / name)
                files.sync_file(target / name)
            files.write_file(target / META, stored.meta)
            marks[META] = (len(stored.meta), files.sha256_of(target / META))
        files.sync_directory(target)
        return {
            "format": _FORMAT,
            "language": self._language,
            "indexed": b64encode(stored.rows.serialize()).decode(),
            "length": [stored.length.terms, stored.length.documents],
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in marks.items()},
        }


def thaw(directory: Path, language: str, state: Mapping[str, Any]) -> tuple[DiskIndex, Stored]:
    """
    Return the index whose frozen files, or links to them, are in *directory*; it goes on there, and they stay as they are.

    What else is in *directory* is removed. Raises Damaged.
    """
    try:
        if state["format"] != _FORMAT or state["language"] != language:
            raise Damaged("the words were indexed in another way")
        marks = {str(name): (int(mark["bytes"]), str(mark["sha256"])) for name, mark in state["files"].items()}
        rows = BitMap.deserialize(b64decode(state["indexed"]))
        length = MeanLength(*map(int, state["length"]))
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f"the state of the lexical index cannot be read: {error}") from error
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.name not in marks:
            files.remove(path)
    for name, (size, digest) in marks.items():
        files.check_file(directory / name, size, digest)
    if not marks:
        index = DiskIndex(directory, language)
        return index, Stored(index.part(BitMap()))
    files.write_file(directory / MANAGED, json.dumps(sorted(marks)).encode())
    try:
        index = DiskIndex(directory, language)
        part = index.part(rows)
    except Exception as error:
        raise Damaged(f"the lexical index cannot be opened: {error}") from error
    meta = files.read_file(directory / META)
    return index, Stored(part, meta, {name: mark for name, mark in marks.items() if name != META}, length)


def _named(meta: bytes, directory: Path) -> list[str]:
    """Return the names of the files, but for itself, that a meta.json names: by segment, and by its last deletion."""
    found: list[str] = []
    for segment in json.loads(meta)["segments"]:
        stem = segment["segment_id"].replace("-", "")
        deletes = segment["deletes"]
        newest = f"{stem}.{deletes['opstamp']}.del" if deletes else None
        names = [path.name for path in directory.glob(f"{stem}.*")]
        found.extend(name for name in names if not name.endswith(".del") or name == newest)
    return sorted(found)


def _chunks(rows: list[int]) -> Iterable[list[int]]:
    return (rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS))
