"""The collections there are: created, found by name or alias, described, deleted."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.common.deadline import Deadline
from services.common.errors import Conflict, InvalidInput, NotFound, Unavailable
from services.common.wire.collections import CollectionReply, CollectionStats, ShardStats
from services.search.names import KnownNames
from services.search.ports import (
    AttributeKind,
    Collection,
    CollectionState,
    EmbeddingClient,
    Ledger,
    Metric,
    Retriever,
    ShardStanding,
)

OWN_VECTORS = "own-vectors"


@dataclass(frozen=True, slots=True)
class CollectionSettings:
    """What a collection is to be made with; None is left to the default. *dim* is for the documents' own vectors."""

    model: str | None = None
    dim: int | None = None
    shards: int | None = None
    metric: Metric = "cosine"
    attributes: Mapping[str, AttributeKind] | None = None
    language: str = "english"


class Catalog:
    """
    Names to collections, over the ledger.

    Where this process is the ledger's only writer, what was read once stays true until it is changed here. Otherwise
    names are looked up again after a second, and what is known serves on while the ledger cannot be reached.
    """

    def __init__(
        self,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
        *,
        default_collection: str,
        default_shards: int,
        languages: Sequence[str] = ("english",),
        create_on_write: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use *languages* as those that there are analysers for; without *create_on_write* only `create` makes any."""
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._default_collection = default_collection
        self._default_shards = default_shards
        self._languages = languages
        self._create_on_write = create_on_write
        self._names = KnownNames(ledger, clock=clock)

    async def find(self, name: str | None) -> Collection | None:
        """Return the collection that *name* or the alias *name* means (None: the default one), if there is one."""
        return await self._names.find(name or self._default_collection)

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

    async def create(self, name: str, wanted: CollectionSettings, deadline: Deadline) -> Collection:
        """
        Create a collection for a model of the embedding service, or for the vectors that its documents bring.

        Raises:
            Conflict: The name is taken; says in what the collection of that name differs.
            InvalidInput: There is no such language, or both a model and a dimension are given.
            NotFound: The embedding service has no such model.
            DependencyUnavailable: The embedding service, which knows the model, does not answer.
        """
        if (found := await self.find(name)) is not None:
            raise _taken(name, found, wanted)
        if wanted.language not in self._languages:
            known = ", ".join(sorted(self._languages))
            raise InvalidInput(f"language: there is no {wanted.language!r}; there are: {known}", param="language")
        if wanted.dim is not None and wanted.model is not None:
            raise InvalidInput("dim: is for collections without a model, whose dimensions are its own", param="dim")
        model_name: str | None = None
        fingerprint, dim = OWN_VECTORS, wanted.dim or 0
        if wanted.dim is None:
            model = await self._embedding.model(deadline, model=wanted.model)
            model_name, fingerprint, dim = model.name, model.fingerprint, model.dim
        made = Collection(
            uuid=uuid.uuid4().hex,
            name=name,
            model=model_name,
            fingerprint=fingerprint,
            dim=dim,
            shards=wanted.shards or self._default_shards,
            created_at=time.time(),
            metric=wanted.metric,
            attributes=wanted.attributes,
            language=wanted.language,
        )
        await self._ledger.create_collection(made)
        self._names.put(name, made)
        return made

    async def for_write(self, name: str, deadline: Deadline, *, dim: int | None) -> Collection:
        """
        Return the collection *name*, created now if need be; of two callers at once, one creates and both get it.

        Raises:
            NotFound: There is none, and writes are not to create any.
        """
        found = await self.find(name)
        if found is not None:
            return found
        if not self._create_on_write:
            return await self.get(name)  # Raises, and says which there are.
        try:
            return await self.create(name, CollectionSettings(dim=dim), deadline)
        except Conflict:
            return await self.get(name)

    async def delete(self, name: str) -> Collection:
        """Delete a collection with all its documents and aliases. Raises NotFound, and Conflict for an alias."""
        collection = await self.get(name)
        if collection.name != name:
            raise Conflict(
                f"{name!r} is an alias of {collection.name!r}: remove the alias, or delete that collection by its name",
                param="name",
            )
        await self._ledger.delete_collection(collection.uuid)
        self._names.forget()  # Not before: whoever looks meanwhile would read it back in.
        await self._retriever.forget(collection)
        return collection

    async def aliases(self) -> dict[str, str]:
        """Return every alias with the name of its collection."""
        return await self._ledger.list_aliases()

    async def set_aliases(self, changes: Mapping[str, str | None]) -> dict[str, str]:
        """Let each alias mean the collection named, or nothing for None, all at once; see Ledger.set_aliases."""
        await self._ledger.set_aliases(changes)
        self._names.forget()
        return await self.aliases()

    async def describe(self, collection: Collection) -> CollectionReply:
        """Return the collection with its size and how far its shards are."""
        return await self._describe(collection, await self.aliases())

    async def describe_all(self) -> list[CollectionReply]:
        """Return all collections by name."""
        aliases = await self.aliases()
        return [await self._describe(collection, aliases) for collection in await self._ledger.list_collections()]

    async def overview(self) -> tuple[list[CollectionReply], str | None]:
        """Return all collections by name, and None; none of them, and why, while the ledger cannot be read."""
        try:
            return await self.describe_all(), None
        except Unavailable as error:
            return [], error.message

    async def stats(self, collection: Collection, deadline: Deadline) -> CollectionStats:
        """
        Return how the collection's ledger and its shards stand; hosts that do not answer are missing.

        While the ledger cannot be read, what was last heard of it stands in, and the documents that the shards hold.
        """
        standings = await self._retriever.standings(collection, deadline)
        try:
            state = await self._ledger.state(collection.uuid)
        except Unavailable:
            state = CollectionState(self._ledger.heard_seq(collection.uuid), _held(standings))
        return CollectionStats(
            collection=collection.name,
            documents=state.documents,
            seq=state.seq,
            trimmed_seq=state.trimmed_seq,
            hosts={
                host: [ShardStats.model_validate(standing, from_attributes=True) for standing in shards]
                for host, shards in standings.items()
            },
        )

    async def _describe(self, collection: Collection, aliases: Mapping[str, str]) -> CollectionReply:
        state = await self._ledger.state(collection.uuid)
        return CollectionReply(
            name=collection.name,
            uuid=collection.uuid,
            model=collection.model,
            fingerprint=collection.fingerprint,
            dim=collection.dim,
            metric=collection.metric,
            shards=collection.shards,
            documents=state.documents,
            seq=state.seq,
            applied_seq=await self._retriever.applied_seq(collection),
            attributes=collection.attributes,
            language=collection.language,
            aliases=sorted(alias for alias, name in aliases.items() if name == collection.name),
            created_at=collection.created_at,
        )


def _held(standings: Mapping[str, Sequence[ShardStanding]]) -> int:
    """Return how many documents the shards have, each by its fullest replica."""
    fullest: dict[int, int] = {}
    for standing in (standing for shards in standings.values() for standing in shards):
        fullest[standing.shard] = max(standing.documents, fullest.get(standing.shard, 0))
    return sum(fullest.values())


def differences(found: Collection, wanted: CollectionSettings) -> list[str]:
    """Return in what *found* is not as *wanted*, each as words: what is left to a default does not count."""
    pairs: list[tuple[str, object, object]] = [("metric", found.metric, wanted.metric)]
    pairs.append(("language", found.language, wanted.language))
    if wanted.shards is not None:
        pairs.append(("shards", found.shards, wanted.shards))
    if wanted.model is not None:
        pairs.append(("model", found.model, wanted.model))
    if wanted.dim is not None:
        pairs.append(("dim", found.dim, wanted.dim))
        pairs.append(("model", found.model, None))
    if wanted.attributes is not None:
        pairs.append(("attributes", None if found.attributes is None else dict(found.attributes), wanted.attributes))
    return [f"{name} {has!r}, not {asked!r}" for name, has, asked in pairs if has != asked]


def _taken(name: str, found: Collection, wanted: CollectionSettings) -> Conflict:
    if found.name != name:
        return Conflict(f"The name {name!r} is an alias of the collection {found.name!r}", param="name")
    others = differences(found, wanted)
    if not others:
        return Conflict(f"The collection {name!r} exists already, with these settings", param="name")
    return Conflict(
        f"The collection {name!r} exists already and has {'; '.join(others)}. To change that, copy it: "
        f"POST /collections/{name}/reindex with a new target (tercet reindex)",
        param="name",
    )
