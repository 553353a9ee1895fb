"""Which shard a document belongs to, and the part of a ledger that one shard is made of."""

from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b

from services.search.ports import Collection, Ledger, Operation

_PAGE = 500


def shard_of(document_id: str, shards: int) -> int:
    """Return the number of the shard, of *shards*, that holds *document_id*; the same for ever and everywhere."""
    digest = blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % shards


async def ledger_slice(ledger: Ledger, collection: Collection, number: int) -> AsyncIterator[Sequence[Operation]]:
    """Yield all operations of one shard, page by page, until there are none; reading begins with the first page."""
    seq = 0
    while page := await ledger.operations_after(collection.uuid, seq, limit=_PAGE):
        seq = page[-1].seq
        yield [operation for operation in page if shard_of(operation.id, collection.shards) == number]
