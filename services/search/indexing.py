"""The write path: documents → vectors (only of what changed) → one ledger transaction → shards → acknowledgement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.common.deadline import Deadline
from services.common.errors import Conflict, InvalidInput, NotFound
from services.common.wire.documents import DeleteReply, Document, WriteReply
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import content_hash, embedded_hash, model_text
from services.search.ports import Collection, EmbeddingClient, KnownDocument, Ledger, LedgerDocument, Retriever, Vector


@dataclass(frozen=True, slots=True)
class _Draft:
    """A document on its way in: its hashes, and its own vector if it brought one."""

    document: Document
    own_vector: Vector | None
    content_hash: bytes
    embedded_hash: bytes


class Indexing:
    """Takes documents in and out. Acknowledged means: synced in the ledger."""

    def __init__(self, catalog: Catalog, ledger: Ledger, retriever: Retriever, embedding: EmbeddingClient) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding

    async def write(self, name: str, documents: Sequence[Document], deadline: Deadline, *, wait: bool) -> WriteReply:
        """
        Store *documents* (distinct ids), all or none; with *wait* return once every shard has applied them.

        Unchanged documents make no operation; unchanged text keeps its vector, so only new text reaches the model.

        Raises:
            InvalidInput: A vector has the wrong length or is zero; `documents.N.vector` says which.
            Conflict: The embedding service's model is not the collection's.
            DependencyUnavailable, DeadlineExceeded, Overloaded: Nothing was written; the same call may succeed later.
        """
        own = [document.vector for document in documents if document.vector is not None]
        dim = len(own[0]) if own and len(own) == len(documents) else None
        existing = await self._catalog.find(name)
        expected = existing.dim if existing else dim
        if own and expected is None:  # The others are for the model, which decides the new collection's dimension.
            expected = (await self._embedding.model(deadline)).dim
        drafts = [_draft(i, document, expected) for i, document in enumerate(documents)]
        collection = existing or await self._catalog.get_or_create(name, deadline, dim=dim)
        if own and collection.dim != expected:  # Somebody else has just created it.
            drafts = [_draft(i, document, collection.dim) for i, document in enumerate(documents)]
        known = await self._ledger.known(collection.uuid, [document.id for document in documents])
        changed = [draft for draft in drafts if not _same(draft, known.get(draft.document.id))]
        vectors, embedded = await self._vectors(collection, changed, known, drafts, deadline)
        upserts = [
            LedgerDocument(
                id=draft.document.id,
                text=draft.document.text,
                title=draft.document.title,
                metadata=draft.document.metadata,
                vector=vector,
                content_hash=draft.content_hash,
                embedded_hash=draft.embedded_hash,
            )
            for draft, vector in zip(changed, vectors, strict=True)
        ]
        if upserts:
            seq = await self._ledger.append(collection.uuid, upserts)
            self._retriever.notify(collection, seq)
        else:
            seq = (await self._ledger.state(collection.uuid)).seq
        applied = wait and await self._retriever.wait_applied(collection, seq, deadline)
        return WriteReply(
            collection=name,
            accepted=len(documents),
            unchanged=len(documents) - len(changed),
            embedded=embedded,
            seq=seq,
            applied=applied,
        )

    async def _vectors(
        self,
        collection: Collection,
        changed: Sequence[_Draft],
        known: dict[str, KnownDocument],
        drafts: Sequence[_Draft],
        deadline: Deadline,
    ) -> tuple[list[Vector], int]:
        """Return a vector for each of *changed*, and how many texts the model was given."""
        texts: dict[str, Vector | None] = {}
        for draft in changed:
            if draft.own_vector is None and not _same_text(draft, known.get(draft.document.id)):
                if collection.fingerprint == OWN_VECTORS:
                    param = f"documents.{drafts.index(draft)}.vector"
                    raise InvalidInput(f"{param}: is required, since this collection has no model", param=param)
                texts[_text_of(draft)] = None
        if texts:
            made = await self._embedding.embed_documents(list(texts), deadline)
            check_fingerprint(collection, made.model.fingerprint)
            texts = dict(zip(texts, made.vectors, strict=True))
        vectors = []
        for draft in changed:
            vector = draft.own_vector
            if vector is None:
                vector = texts.get(_text_of(draft))
            vectors.append(known[draft.document.id].vector if vector is None else vector)
        return vectors, len(texts)

    async def delete(self, name: str, ids: Sequence[str], deadline: Deadline, *, wait: bool) -> DeleteReply:
        """Delete the documents of *ids*; those that do not exist are passed over. Raises NotFound for the collection."""
        collection = await self._catalog.get(name)
        deleted, seq = await self._ledger.delete(collection.uuid, ids)
        if deleted:
            self._retriever.notify(collection, seq)
        applied = wait and await self._retriever.wait_applied(collection, seq, deadline)
        return DeleteReply(collection=name, deleted=deleted, seq=seq, applied=applied)

    async def get(self, name: str, document_id: str) -> LedgerDocument:
        """Return one document from the ledger. Raises NotFound."""
        collection = await self._catalog.get(name)
        found = (await self._ledger.documents(collection.uuid, [document_id])).get(document_id)
        if found is None:
            raise NotFound(f"There is no document {document_id[:100]!r} in {name!r}", param="id")
        return found


def check_fingerprint(collection: Collection, fingerprint: str) -> None:
    """Do nothing if the embedding service's model is the collection's. Raises Conflict with both fingerprints."""
    if fingerprint != collection.fingerprint:
        raise Conflict(
            f"The collection {collection.name!r} was made with {collection.fingerprint}, but the embedding service now runs "
            f"{fingerprint}; run the former, or index into a new collection",
            param="collection",
        )


def unit_vector(values: Sequence[float], dim: int | None, param: str) -> Vector:
    """Return *values* at unit length. Raises InvalidInput, naming *param*, for a wrong dimension or a zero vector."""
    exact = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        finite = np.isfinite(exact.astype(np.float32)).all()
        norm = float(np.linalg.norm(exact))
    if dim is not None and len(exact) != dim:
        raise InvalidInput(f"{param}: has {len(exact)} dimensions; this collection has {dim}", param=param)
    if not finite or norm < 1e-12:
        raise InvalidInput(f"{param}: must have finite float32 values that are not all zero", param=param)
    return np.asarray(exact / norm, dtype=np.float32)


def _draft(index: int, document: Document, dim: int | None) -> _Draft:
    own = None if document.vector is None else unit_vector(document.vector, dim, f"documents.{index}.vector")
    raw = b"" if own is None else own.tobytes()
    return _Draft(
        document,
        own,
        content_hash(document.text, document.title, document.metadata, raw),
        embedded_hash(document.title, document.text, raw),
    )


def _same(draft: _Draft, known: KnownDocument | None) -> bool:
    return known is not None and known.content_hash == draft.content_hash


def _same_text(draft: _Draft, known: KnownDocument | None) -> bool:
    return known is not None and known.embedded_hash == draft.embedded_hash


def _text_of(draft: _Draft) -> str:
    return model_text(draft.document.title, draft.document.text)
