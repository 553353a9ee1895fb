"""
Documents' token vectors as they are kept and shared: int8 with a scale a token; and MaxSim over them.

A kept vector has unit length whatever rounding did to it, so that a product with a unit vector is a cosine.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Vectors = NDArray[np.float32]

ENTRY_OVERHEAD_BYTES: Final = 600  # What Python and NumPy keep for an entry besides the numbers.
NOTHING_ALIKE: Final = -1.0  # The score of a text without tokens: no cosine is less.

_GREATEST: Final = 127.0
# Tokens whose vectors are multiplied at once: as float32 they stay in a core's own cache.
TOKENS_AT_ONCE: Final = 1024

# Magic with a version, tokens, dimensions; then a float32 scale for each token, then the int8 numbers, token by token.
_HEADER: Final = struct.Struct("<4sII")
_MAGIC: Final = b"TTV1"


class TokenVectors(NamedTuple):
    """
    The vectors of a text's tokens: row i of *codes*, int8 of shape [tokens, dim], times *scales*[i], float32.

    A scale is 0 for a vector of zeros, and not a number where the model gave numbers that are not finite.
    """

    codes: NDArray[np.int8]
    scales: Vectors

    @property
    def nbytes(self) -> int:
        """What it takes in memory, roughly."""
        return ENTRY_OVERHEAD_BYTES + self.codes.nbytes + self.scales.nbytes

    @property
    def finite(self) -> bool:
        """Whether all numbers that it was made from were."""
        return bool(np.isfinite(self.scales).all())


def quantized(vectors: Vectors) -> TokenVectors:
    """Return *vectors*, shape [tokens, dim] and of any length, as unit vectors in int8."""
    greatest = np.abs(vectors).max(axis=1, initial=0.0, keepdims=True)
    finite = np.isfinite(greatest)
    steps = np.where(finite & (greatest > 0.0), greatest, np.inf) / _GREATEST
    rounded = np.rint(np.where(finite, vectors, 0.0) / steps)
    lengths = np.sqrt(np.einsum("td,td->t", rounded, rounded))
    scales = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    scales[~finite[:, 0]] = np.nan
    return TokenVectors(rounded.astype(np.int8), scales.astype(np.float32))


def packed(vectors: TokenVectors) -> bytes:
    """Return *vectors* as bytes: a header of fixed size, the scales, the numbers; little-endian."""
    tokens, dim = vectors.codes.shape
    return (
        _HEADER.pack(_MAGIC, tokens, dim)
        + np.ascontiguousarray(vectors.scales, dtype="<f4").tobytes()
        + np.ascontiguousarray(vectors.codes).tobytes()
    )


def unpacked(raw: bytes, *, most_tokens: int, dim: int) -> TokenVectors | None:
    """Return what `packed` made of up to *most_tokens* vectors of *dim* numbers; None where *raw* is anything else."""
    if len(raw) < _HEADER.size:
        return None
    magic, tokens, numbers = _HEADER.unpack_from(raw)
    if magic != _MAGIC or numbers != dim or tokens > most_tokens or len(raw) != _HEADER.size + tokens * (4 + dim):
        return None
    scales = np.frombuffer(raw, dtype="<f4", count=tokens, offset=_HEADER.size).astype(np.float32)
    codes = np.frombuffer(raw, dtype=np.int8, offset=_HEADER.size + 4 * tokens).reshape(tokens, dim)
    possible = ((scales >= 0.0) & (scales <= 1.0)).all()
    return TokenVectors(codes, scales) if possible else None


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def in_one_thread() -> AbstractContextManager[object]:
    """
    Return a context in which NumPy's products use one thread.

    On cores that others use too, threads that share a small product wait for each other: for up to a second, where
    one does all of it in a millisecond.
    """
    made: AbstractContextManager[object] = _blas().limit(limits=1, user_api="blas")
    return made


class MaxSim:
    """The sum, over a query's vectors, of the greatest product with any vector of a document. For one thread."""

    def __init__(self, dim: int) -> None:
        self._room = np.empty((TOKENS_AT_ONCE, dim), dtype=np.float32)

    def __call__(self, query: Vectors, documents: Sequence[TokenVectors]) -> Vectors:
        """
        Return a number for each of *documents*; *query* has shape [tokens, dim].

        It is NOTHING_ALIKE where either has no tokens, and not a number where either holds one that is not.
        """
        scores = np.full(len(documents), NOTHING_ALIKE, dtype=np.float32)
        if not len(query):
            return scores
        with in_one_thread():
            for positions in _runs([len(document.scales) for document in documents]):
                scores[positions] = self._sums(query, [documents[position] for position in positions])
        return scores

    def _sums(self, query: Vectors, documents: Sequence[TokenVectors]) -> Vectors:
        lengths = np.array([len(document.scales) for document in documents])
        ends = np.cumsum(lengths)
        # A long document's room is not kept for ever.
        fits = ends[-1] <= len(self._room)
        numbers = self._room[: ends[-1]] if fits else np.empty((ends[-1], self._room.shape[1]), dtype=np.float32)
        np.concatenate([document.codes for document in documents], out=numbers)
        products = query @ numbers.T
        products *= np.concatenate([document.scales for document in documents])
        sums: Vectors = np.maximum.reduceat(products, ends - lengths, axis=1).sum(axis=0)
        return sums


def _runs(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield positions of *lengths* over 0, in order, in runs that add up to TOKENS_AT_ONCE, or of one."""
    run: list[int] = []
    total = 0
    for position, length in enumerate(lengths):
        if not length:
            continue
        if run and total + length > TOKENS_AT_ONCE:
            yield run
            run, total = [], 0
        run.append(position)
        total += length
    if run:
        yield run
