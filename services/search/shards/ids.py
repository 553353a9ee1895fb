"""The ids of a shard's rows, in one piece of memory: a string object for each would take four times as much."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from services.search.shards.files import Damaged


class IdArena:
    """Ids by row, as UTF-8 one behind the other. One writer and many readers may use it at once."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        """Return the next row number."""
        return len(self._ends)

    def extend(self, first_row: int, ids: Iterable[str]) -> None:
        """Append *ids* as rows *first_row*, *first_row* + 1, …; rows that were passed over have the id ""."""
        encoded = [id.encode() for id in ids]
        if first_row < len(self._ends):
            raise ValueError(f"row {first_row} has an id already")
        end = len(self._bytes)
        ends = [end] * (first_row - len(self._ends))
        for id in encoded:
            end += len(id)
            ends.append(end)
        self._bytes += b"".join(encoded)
        self._ends.extend(ends)  # After the bytes: what a reader can ask for is there.

    def get(self, rows: Sequence[int]) -> list[str]:
        """Return the ids of *rows*, in their order."""
        ends, data = self._ends, self._bytes
        return [data[ends[row - 1] if row else 0 : ends[row]].decode() for row in rows]

    def freeze(self) -> bytes:
        """Return all of it as bytes that `load` reads."""
        ends = np.frombuffer(self._ends.tobytes(), np.uint64).astype("<u8")
        return b"".join((len(ends).to_bytes(8, "little"), ends.tobytes(), bytes(self._bytes)))

    @classmethod
    def load(cls, frozen: bytes) -> "IdArena":
        """Return the ids that `freeze` wrote. Raises Damaged."""
        made = cls()
        count = int.from_bytes(frozen[:8], "little")
        head = 8 + 8 * count
        if len(frozen) < head:
            raise Damaged("the ids are cut off")
        made._ends = array("Q", np.frombuffer(frozen, "<u8", count, 8).astype(np.uint64).tobytes())
        made._bytes = bytearray(memoryview(frozen)[head:])
        if len(made._bytes) != (made._ends[-1] if count else 0):
            raise Damaged("the ids are cut off")
        return made

    @property
    def memory_bytes(self) -> int:
        """How much memory it takes."""
        return len(self._bytes) + self._ends.itemsize * len(self._ends)
