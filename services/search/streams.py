"""Streams of documents, read as they arrive: NDJSON and MessagePack, in memory bounded by one document and one chunk."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import orjson

from services.common.errors import Malformed, TercetError, TooLarge
from services.common.wire.documents import MAX_DIMENSIONS, MAX_DOCUMENT_BYTES, DocumentError
from services.search.documents import Draft, failure, read_document

PIECE_BYTES = 256 * 1024
_ARRAYS = (*range(0x90, 0xA0), 0xDC, 0xDD)


@dataclass(frozen=True, slots=True)
class Arrived:
    """One document of a stream: what it is, or what is wrong with it, and the bytes it came in, as they were sent."""

    item: Draft | DocumentError
    raw: bytes
    size: int


async def read_ndjson(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[Arrived]]:
    """
    Yield the documents of each of *chunks*, one a line; blank lines are passed over and not counted.

    A line that is no JSON, or is over 8 MiB, is an error of its own; the next line is read again.
    """
    lines = _Lines()
    index = 0
    async for chunk in chunks:
        found, index = _read_lines(lines.take(chunk), index)
        yield found
    found, _ = _read_lines(lines.rest(), index)
    yield found


def _read_lines(lines: Iterator[bytes | None], index: int) -> tuple[list[Arrived], int]:
    found = []
    for line in lines:
        if line is not None and not line.strip():
            continue
        found.append(_read_line(index, line))
        index += 1
    return found, index


def _read_line(index: int, line: bytes | None) -> Arrived:
    if line is None:
        large = TooLarge(f"the line is over {MAX_DOCUMENT_BYTES:,} bytes")
        return Arrived(failure(index, None, large), b"", MAX_DOCUMENT_BYTES)
    try:
        return Arrived(read_document(index, orjson.loads(line)), line, len(line))
    except orjson.JSONDecodeError as error:
        broken = Malformed(f"the line is not valid JSON: {error.msg}")
        return Arrived(failure(index, None, broken), line, len(line))


class _Lines:
    """Cuts chunks into lines; one that is too long is thrown away as it arrives and comes out as None."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def take(self, chunk: bytes) -> Iterator[bytes | None]:
        """Yield the lines that end in *chunk*."""
        *ended, last = chunk.split(b"\n")
        for part in ended:
            self._add(part)
            yield from self.rest()
        self._add(last)

    def rest(self) -> Iterator[bytes | None]:
        """Yield what came since the last line's end."""
        line = None if self._size > MAX_DOCUMENT_BYTES else b"".join(self._parts)
        self._parts, self._size = [], 0
        yield line

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > MAX_DOCUMENT_BYTES:
            self._parts = []
        elif part:
            self._parts.append(part)


async def read_msgpack(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[Arrived]]:
    """
    Yield the documents of each of *chunks*: maps one after the other, or arrays of maps.

    A map's `vector` may be little-endian float32 bytes. Raises Malformed for bytes that are no MessagePack, which
    nothing after them can be read from, and TooLarge for a document over 8 MiB.
    """
    reader = _Maps()
    async for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):
            found: list[Arrived] = []
            try:
                found.extend(reader.take(chunk[start : start + PIECE_BYTES]))
            except TercetError:
                yield found
                raise
            yield found
    reader.end()


class _Maps:
    """Reads maps from pieces of MessagePack; an array's header is taken for no more than a way to write several."""

    def __init__(self) -> None:
        # Lone surrogates come through, so that it is the document that holds them which is refused.
        self._unpacker = msgpack.Unpacker(
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=False,
            max_buffer_size=MAX_DOCUMENT_BYTES + 2 * PIECE_BYTES,
            max_array_len=MAX_DIMENSIONS,
        )
        self._held = b""
        self._held_from = 0
        self._position = 0
        self._open = 0
        self._inside = False
        self._index = 0

    def take(self, piece: bytes) -> Iterator[Arrived]:
        """Yield the maps that end in *piece*."""
        self._held = self._held[self._position - self._held_from :] + piece
        self._held_from = self._position
        self._unpacker.feed(piece)
        while (found := self._next()) is not None:
            yield found
        if self._held_from + len(self._held) - self._position > MAX_DOCUMENT_BYTES:
            raise TooLarge(f"Document {self._index} is over {MAX_DOCUMENT_BYTES:,} bytes", param="body")

    def end(self) -> None:
        """Raise Malformed where the stream ended inside of a document or an array."""
        if self._position < self._held_from + len(self._held) or self._open:
            raise Malformed(f"The stream ended inside of document {self._index}", param="body")

    def _next(self) -> Arrived | None:
        try:
            while not (self._open or self._inside) and self._at_array():
                self._open = self._unpacker.read_array_header()
                self._cut()
            self._inside = True
            value = self._unpacker.unpack()
        except msgpack.OutOfData:
            return None
        except Exception as error:
            message = f"Document {self._index} cannot be read as MessagePack: {error}"[:200]
            raise Malformed(message, param="body") from None
        self._inside = False
        raw = self._cut()
        self._open = max(0, self._open - 1)
        index, self._index = self._index, self._index + 1
        return Arrived(read_document(index, _with_text_keys(value)), raw, len(raw))

    def _at_array(self) -> bool:
        offset = self._position - self._held_from
        if offset == len(self._held):
            raise msgpack.OutOfData
        return self._held[offset] in _ARRAYS

    def _cut(self) -> bytes:
        """Return the bytes that were read since the last time."""
        start = self._position
        self._position = self._unpacker.tell()
        return self._held[start - self._held_from : self._position - self._held_from]


def _with_text_keys(value: Any) -> Any:
    """Return a map with keys that can be named in an error."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return {str(key): item for key, item in value.items()}
    return value
