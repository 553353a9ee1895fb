"""What a raw vector depends on, as a short key: the same for the cache and for identical inputs in flight."""

import hashlib
from collections.abc import Sequence

import numpy as np

from services.embedding.engine import Work

KEY_BYTES = 20
_MAX_PREFIXES = 256


class VectorKeys:
    """Keys of one model's vectors: model, prompt, length limit, cut side and kind of output, then the input."""

    def __init__(self, fingerprint: str, max_tokens: int) -> None:
        self._model = _part(fingerprint.encode()) + _part(b"%d" % max_tokens)
        self._prefixes: dict[tuple[str, str, bool, bool], hashlib.blake2b] = {}

    def of(self, work: Sequence[Work]) -> list[bytes]:
        """Return one key an input, in order, KEY_BYTES long."""
        return [self._key(one) for one in work]

    def _key(self, work: Work) -> bytes:
        text = isinstance(work.input, str)
        kind = (work.prompt if text else "", work.direction, work.per_token, text)
        started = self._prefixes.get(kind) or self._start(kind)
        digest = started.copy()
        digest.update(
            work.input.encode() if isinstance(work.input, str) else np.asarray(work.input, dtype="<i8").tobytes()
        )
        return digest.digest()

    def _start(self, kind: tuple[str, str, bool, bool]) -> "hashlib.blake2b":
        prompt, direction, per_token, text = kind
        parts = _part(prompt.encode()) + _part(direction.encode()) + (b"\1" if per_token else b"\0")
        started = hashlib.blake2b(self._model + parts + (b"\1" if text else b"\0"), digest_size=KEY_BYTES)
        if len(self._prefixes) < _MAX_PREFIXES:
            self._prefixes[kind] = started
        return started


def _part(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value
