"""Idempotency keys: what was asked under a key, and what it was answered, kept in the ledger with the write itself."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from services.common.errors import Conflict, InvalidInput
from services.search.ports import Collection, Ledger, Receipt

MAX_KEY_CHARS = 255


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A caller's name for a write, and the digest of what it asks; a part of a stream has a key of its own."""

    name: str
    digest: bytes

    @classmethod
    def of(cls, name: str, asked: Iterable[bytes]) -> "IdempotencyKey":
        """Return the key *name* of a write whose bytes are *asked*. Raises InvalidInput for a name that is no key."""
        if not 0 < len(name) <= MAX_KEY_CHARS or not name.isprintable():
            raise InvalidInput(
                f"Idempotency-Key: must have 1 to {MAX_KEY_CHARS} printable characters", param="idempotency-key"
            )
        digest = hashlib.blake2b(digest_size=16)
        for part in asked:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return cls(f"key:{name}", digest.digest())

    def receipt(self, body: bytes) -> Receipt:
        """Return the receipt to keep with the write that is answered with *body*."""
        return Receipt(self.name, self.digest, body)


async def find_answer(ledger: Ledger, collection: Collection, key: IdempotencyKey | None) -> Receipt | None:
    """
    Return the receipt of the write that was made under *key*, if it was.

    Raises:
        Conflict: Something else was asked under that key.
    """
    found = None if key is None else await ledger.find_receipt(collection.uuid, key.name)
    if key is None or found is None:
        return None
    if found.digest != key.digest:
        raise Conflict("This Idempotency-Key was used for another request", param="idempotency-key")
    # What was found out only after its receipt was written has a receipt of its own.
    amended = await ledger.find_receipt(collection.uuid, amendment(key).name)
    return amended if amended is not None and amended.digest == key.digest else found


def amendment(key: IdempotencyKey) -> IdempotencyKey:
    """Return the key under which an answer that differs from the first receipt's is kept."""
    return IdempotencyKey(f"{key.name}\n", key.digest)
