"""The collections there are: created, found by name, described, deleted."""

import time
import uuid

from services.common.deadline import Deadline
from services.common.errors import Conflict, NotFound
from services.common.wire.collections import CollectionReply
from services.search.ports import Collection, EmbeddingClient, Ledger, Retriever

OWN_VECTORS = "own-vectors"


class Catalog:
    """
    Names to collections, over the ledger.

    Only this process writes to an embedded ledger, so what was read once stays true until it is changed here.
    """

    def __init__(
        self,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
        *,
        default_collection: str,
        default_shards: int,
    ) -> None:
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._default_collection = default_collection
        self._default_shards = default_shards
        self._by_name: dict[str, Collection] = {}

    async def find(self, name: str | None) -> Collection | None:
        """Return the collection *name* (None: the default one), if there is one."""
        wanted = name or self._default_collection
        found = self._by_name.get(wanted)
        if found is None:
            found = await self._ledger.find_collection(wanted)
            if found is not None:
                self._by_name[wanted] = found
        return found

    async def get(self, name: str | None) -> Collection:
        """Return the collection *name* (None: the default one). Raises NotFound with the names there are."""
        found = await self.find(name)
        if found is not None:
            return found
        names = [collection.name for collection in await self._ledger.list_collections()]
        there_are = (
            f"there are: {', '.join(names[:20])}" if names else "there are none yet: write documents to create one"
        )
        raise NotFound(f"There is no collection {name or self._default_collection!r}; {there_are}", param="collection")

    async def create(
        self, name: str, deadline: Deadline, *, shards: int | None = None, dim: int | None = None
    ) -> Collection:
        """
        Create a collection for the embedding service's model, or with *dim* one whose documents bring their vectors.

        Raises:
            Conflict: The name is taken.
            DependencyUnavailable: The embedding service, which knows the model, does not answer.
        """
        if await self.find(name) is not None:
            raise Conflict(f"The collection {name!r} exists already", param="name")
        if dim is None:
            model = await self._embedding.model(deadline)
            model_name, fingerprint, dim = model.name, model.fingerprint, model.dim
        else:
            model_name, fingerprint = None, OWN_VECTORS
        made = Collection(
            uuid=uuid.uuid4().hex,
            name=name,
            model=model_name,
            fingerprint=fingerprint,
            dim=dim,
            shards=shards or self._default_shards,
            created_at=time.time(),
        )
        await self._ledger.create_collection(made)
        self._by_name[name] = made
        return made

    async def get_or_create(self, name: str, deadline: Deadline, *, dim: int | None) -> Collection:
        """Return the collection *name*, created now if need be; of two callers at once, one creates and both get it."""
        found = await self.find(name)
        if found is not None:
            return found
        try:
            return await self.create(name, deadline, dim=dim)
        except Conflict:
            return await self.get(name)

    async def delete(self, name: str) -> Collection:
        """Delete a collection with all its documents. Raises NotFound."""
        collection = await self.get(name)
        await self._ledger.delete_collection(collection.uuid)
        self._by_name.pop(name, None)  # Not before: whoever looks meanwhile would read it back in.
        await self._retriever.forget(collection)
        return collection

    async def describe(self, collection: Collection) -> CollectionReply:
        """Return the collection with its size and how far its shards are."""
        state = await self._ledger.state(collection.uuid)
        return CollectionReply(
            name=collection.name,
            uuid=collection.uuid,
            model=collection.model,
            fingerprint=collection.fingerprint,
            dim=collection.dim,
            metric="cosine",
            shards=collection.shards,
            documents=state.documents,
            seq=state.seq,
            applied_seq=await self._retriever.applied_seq(collection),
        )

    async def describe_all(self) -> list[CollectionReply]:
        """Return all collections by name."""
        return [await self.describe(collection) for collection in await self._ledger.list_collections()]
