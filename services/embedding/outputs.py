"""Vectors as they leave: floats, base64, int8 or sign bits, in JSON or in MessagePack."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import orjson
import ormsgpack
from fastapi import Request, Response
from numpy.typing import NDArray

Encoding = Literal["float", "base64", "int8", "binary"]
MSGPACK = "application/msgpack"
INLINE_FLOATS = 20_000  # Above this many numbers a reply is written in a thread: it would hold up other requests.

DTYPES: dict[str, str] = {"float": "float32", "base64": "float32", "int8": "int8", "binary": "binary"}


def encode_vectors(vectors: NDArray[np.float32], encoding: str) -> list[Any]:
    """
    Return each row as it goes into JSON.

    `float`: the array itself, which `json_response` writes; `base64`: little-endian float32; `int8`: whole numbers, to be
    multiplied by the row's `scales_of`; `binary`: the signs, packed into bytes, less 128, as sentence-transformers does.
    """
    if encoding == "base64":
        return [base64.b64encode(row.tobytes()).decode() for row in vectors]
    if encoding == "int8":
        return list(to_int8(vectors))
    if encoding == "binary":
        return list(to_signs(vectors))
    return list(vectors)


def scales_of(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what each row's int8 numbers are to be multiplied by: its largest magnitude over 127, 1 for zeros."""
    largest = np.abs(vectors).max(axis=1)
    return np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)


def to_int8(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return each row over its scale, rounded: the cosine to the row itself is above 0.999 for usual vectors."""
    scaled: NDArray[np.float32] = vectors / scales_of(vectors)[:, None]
    return np.rint(scaled).astype(np.int8)


def to_signs(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return one bit a dimension, 1 where it is positive, eight to a byte (first in the highest bit), less 128."""
    return (np.packbits(vectors > 0, axis=1).astype(np.int16) - 128).astype(np.int8)


def raw_rows(vectors: NDArray[np.float32], encoding: str) -> list[bytes]:
    """Return each row as bytes for MessagePack: little-endian float32, int8, or packed signs (unsigned, nothing taken off)."""
    if encoding == "int8":
        return [row.tobytes() for row in to_int8(vectors)]
    if encoding == "binary":
        return [row.tobytes() for row in np.packbits(vectors > 0, axis=1)]
    return [row.tobytes() for row in vectors]


def wants_msgpack(request: Request) -> bool:
    """Whether the caller asks for MessagePack."""
    return MSGPACK in request.headers.get("accept", "")


async def json_response(
    payload: dict[str, Any] | list[Any] | Callable[[], Any], *, floats: int, headers: dict[str, str] | None = None
) -> Response:
    """Write *payload*, or what it returns, as JSON; it may hold NumPy arrays. *floats* is about how many numbers it holds."""

    def write() -> bytes:
        return orjson.dumps(payload() if callable(payload) else payload, option=orjson.OPT_SERIALIZE_NUMPY)

    body = await asyncio.to_thread(write) if floats > INLINE_FLOATS else write()
    return Response(body, headers=headers, media_type="application/json")


async def msgpack_response(payload: Callable[[], Any], *, floats: int) -> Response:
    """Write what *payload* returns as MessagePack."""

    def write() -> bytes:
        return ormsgpack.packb(payload(), option=ormsgpack.OPT_SERIALIZE_NUMPY)

    body = await asyncio.to_thread(write) if floats > INLINE_FLOATS else write()
    return Response(body, media_type=MSGPACK)
