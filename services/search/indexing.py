"""The write path: documents → vectors (only of what changed) → one ledger transaction → shards → acknowledgement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from services.common.deadline import Deadline
from services.common.errors import Conflict, InvalidInput, NotFound, TercetError
from services.common.wire.documents import MAX_REPORTED_ERRORS, DocumentError
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import Draft, content_hash, embedded_hash, failure, model_text, own_vector
from services.search.kinds import check_metadata
from services.search.ports import (
    NO_DOCUMENT,
    Collection,
    EmbeddingClient,
    KnownDocument,
    Ledger,
    LedgerDocument,
    Retriever,
    Vector,
)
from services.search.receipts import IdempotencyKey, amendment, find_answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the documents of a write; *seq* is the ledger's last operation number after it."""

    accepted: int
    unchanged: int
    embedded: int
    seq: int
    errors: tuple[DocumentError, ...] = ()

    def as_receipt(self) -> bytes:
        """Return what is kept to answer with again; the ledger keeps *seq* itself."""
        errors = [error.model_dump(exclude_none=True) for error in self.errors[:MAX_REPORTED_ERRORS]]
        return orjson.dumps([self.accepted, self.unchanged, self.embedded, errors])

    @classmethod
    def from_receipt(cls, body: bytes, seq: int) -> "Outcome":
        """Return what `as_receipt` was made from."""
        accepted, unchanged, embedded, errors = orjson.loads(body)
        found = tuple(DocumentError.model_validate({"id": None, **error}) for error in errors)
        return cls(accepted, unchanged, embedded, seq, found)


@dataclass(frozen=True, slots=True)
class Prepared:
    """
    Documents ready to be stored in *collection*: those that differ from what is there, with their vectors.

    *outcome* is what to answer if none of them conflicts; it is final where *replayed* says that all was done before.
    """

    collection: Collection
    upserts: Sequence[LedgerDocument]
    expected: Mapping[str, int]
    places: Mapping[str, int]
    outcome: Outcome
    key: IdempotencyKey | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A draft that fits its collection: its own vector as it is stored, and its hashes."""

    draft: Draft
    own: Vector | None
    content_hash: bytes
    embedded_hash: bytes


class Indexing:
    """Takes documents in. Acknowledged means: synced in the ledger."""

    def __init__(self, catalog: Catalog, ledger: Ledger, retriever: Retriever, embedding: EmbeddingClient) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding

    async def write(
        self,
        name: str,
        documents: Sequence[Draft | DocumentError],
        deadline: Deadline,
        *,
        key: IdempotencyKey | None = None,
    ) -> tuple[Collection | None, Outcome]:
        """
        Store those of *documents* that can be; what is wrong with the others is in the outcome.

        Unchanged documents make no operation; unchanged text keeps its vector, so only new text reaches the model. Under
        a *key* that was used before the outcome is that of then. There is no collection where no document was valid and
        none had been made before.

        Raises:
            Conflict: The embedding service's model is not the collection's, or the key was used for other documents.
            NotFound: There is no such collection, and writes are not to create any.
            DependencyUnavailable, DeadlineExceeded, Overloaded: Nothing was written; the same call may succeed later.
        """
        prepared = await self.prepare(name, documents, deadline, key=key)
        if isinstance(prepared, Outcome):
            return None, prepared
        return prepared.collection, await self.commit(prepared)

    async def prepare(
        self,
        name: str,
        documents: Sequence[Draft | DocumentError],
        deadline: Deadline,
        *,
        key: IdempotencyKey | None = None,
    ) -> Prepared | Outcome:
        """Do all of a write but store it; an Outcome where there is nothing to store and no collection to name."""
        errors = [item for item in documents if isinstance(item, DocumentError)]
        drafts, repeated = _distinct([item for item in documents if isinstance(item, Draft)])
        errors += repeated
        collection = await self._catalog.find(name)
        if collection is not None:
            done = await find_answer(self._ledger, collection, key)
            if done is not None:
                outcome = Outcome.from_receipt(done.body, done.seq)
                return Prepared(collection, (), {}, {}, outcome, replayed=True)
        else:
            drafts, collection, misfits = await self._found(name, drafts, deadline)
            errors += misfits
            if collection is None:
                return Outcome(0, 0, 0, 0, _sorted(errors))
        fitted: list[_Fitted] = []
        for draft in drafts:
            try:
                fitted.append(_fit(draft, collection))
            except TercetError as error:
                errors.append(failure(draft.index, draft.id, error))
        return await self._prepared(collection, fitted, errors, deadline, key)

    async def commit(self, prepared: Prepared) -> Outcome:
        """Store what was prepared in one transaction, and tell the shards."""
        outcome, key = prepared.outcome, prepared.key
        if prepared.replayed:
            return outcome
        collection = prepared.collection
        if not prepared.upserts and (key is None or not outcome.accepted):
            return replace(outcome, seq=(await self._ledger.state(collection.uuid)).seq)
        receipt = None if key is None else key.receipt(outcome.as_receipt())
        try:
            written = await self._ledger.append(
                collection.uuid, prepared.upserts, expected=prepared.expected or None, receipt=receipt
            )
        except Conflict:
            done = await find_answer(self._ledger, collection, key)  # The same write came twice at once.
            if done is None:
                raise
            return Outcome.from_receipt(done.body, done.seq)
        self._retriever.notify(collection, written.seq)
        if written.conflicts:
            outcome = _without(prepared, written.conflicts)
            if key is not None:
                await self._ledger.append(collection.uuid, [], receipt=amendment(key).receipt(outcome.as_receipt()))
        return replace(outcome, seq=written.seq)

    async def applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """Wait until searches of every shard see what was stored up to *seq*; False when the deadline came first."""
        return await self._retriever.wait_applied(collection, seq, deadline)

    async def _found(
        self, name: str, drafts: list[Draft], deadline: Deadline
    ) -> tuple[list[Draft], Collection | None, list[DocumentError]]:
        """Return those of *drafts* that may make a new collection, and that; without any there is none."""
        errors: list[DocumentError] = []
        valid: list[tuple[Draft, int | None]] = []
        for draft in drafts:
            try:
                own = None if draft.vector is None else own_vector(draft.vector, None, "cosine")
                valid.append((draft, None if own is None else len(own)))
            except InvalidInput as error:
                errors.append(failure(draft.index, draft.id, error))
        if not valid:
            return [], None, errors
        dims = [dim for _, dim in valid]
        dim = dims[0] if all(dims) else None
        return [draft for draft, _ in valid], await self._catalog.for_write(name, deadline, dim=dim), errors

    async def _prepared(
        self,
        collection: Collection,
        fitted: list[_Fitted],
        errors: list[DocumentError],
        deadline: Deadline,
        key: IdempotencyKey | None,
    ) -> Prepared:
        known = await self._ledger.known(collection.uuid, [each.draft.id for each in fitted])
        accepted: list[_Fitted] = []
        for each in fitted:
            error = _refusal(collection, each, known.get(each.draft.id))
            if error is None:
                accepted.append(each)
            else:
                errors.append(error)
        changed = [each for each in accepted if not _same(each, known.get(each.draft.id))]
        vectors, embedded = await self._vectors(collection, changed, known, deadline)
        upserts = [_stored(each, vector) for each, vector in zip(changed, vectors, strict=True)]
        return Prepared(
            collection,
            upserts,
            expected={each.draft.id: each.draft.if_seq for each in changed if each.draft.if_seq is not None},
            places={each.draft.id: each.draft.index for each in changed},
            outcome=Outcome(len(accepted), len(accepted) - len(changed), embedded, 0, _sorted(errors)),
            key=key,
        )

    async def _vectors(
        self,
        collection: Collection,
        changed: Sequence[_Fitted],
        known: Mapping[str, KnownDocument],
        deadline: Deadline,
    ) -> tuple[list[Vector], int]:
        """Return a vector for each of *changed*, and how many texts the model was given."""
        texts: dict[str, Vector] = {}
        reads: list[str | None] = []
        for each in changed:
            same = known.get(each.draft.id)
            keeps = each.own is not None or (same is not None and same.embedded_hash == each.embedded_hash)
            reads.append(None if keeps else model_text(each.draft.title, each.draft.text))
        new = list(dict.fromkeys(text for text in reads if text is not None))
        if new:
            texts = dict(zip(new, await embed(self._embedding, collection, new, deadline), strict=True))
        vectors = [
            each.own if each.own is not None else known[each.draft.id].vector if text is None else texts[text]
            for each, text in zip(changed, reads, strict=True)
        ]
        return vectors, len(new)


async def embed(
    embedding: EmbeddingClient, collection: Collection, texts: Sequence[str], deadline: Deadline
) -> Sequence[Vector]:
    """Return the vectors of *texts* by the collection's model. Raises as EmbeddingClient, and Conflict for another model."""
    try:
        made = await embedding.embed_documents(texts, deadline, model=collection.model)
    except NotFound as error:
        raise Conflict(
            f"The collection {collection.name!r} was made with {collection.model} ({collection.fingerprint}), which the "
            f"embedding service does not run: {error.message}",
            param="collection",
        ) from None
    check_fingerprint(collection, made.model.fingerprint)
    return list(made.vectors)


def check_fingerprint(collection: Collection, fingerprint: str) -> None:
    """Do nothing if the embedding service's model is the collection's. Raises Conflict with both fingerprints."""
    if fingerprint != collection.fingerprint:
        raise Conflict(
            f"The collection {collection.name!r} was made with {collection.fingerprint}, but the embedding service now runs "
            f"{fingerprint}; run the former, or index into a new collection",
            param="collection",
        )


def _distinct(drafts: Sequence[Draft]) -> tuple[list[Draft], list[DocumentError]]:
    """Return the first of each id, and an error for each that repeats one."""
    first: dict[str, Draft] = {}
    errors = []
    for draft in drafts:
        earlier = first.setdefault(draft.id, draft)
        if earlier is not draft:
            repeats = InvalidInput(f"id: repeats that of document {earlier.index}", param="id")
            errors.append(failure(draft.index, draft.id, repeats))
    return list(first.values()), errors


def _fit(draft: Draft, collection: Collection) -> _Fitted:
    """Return *draft* as the collection takes it. Raises InvalidInput for a vector or metadata that does not fit."""
    check_metadata(draft.metadata, collection.attributes)
    own = None if draft.vector is None else own_vector(draft.vector, collection.dim, collection.metric)
    raw = b"" if own is None else own.tobytes()
    return _Fitted(
        draft,
        own,
        content_hash(draft.text, draft.title, draft.metadata_json, raw),
        embedded_hash(draft.title, draft.text, raw),
    )


def _refusal(collection: Collection, fitted: _Fitted, known: KnownDocument | None) -> DocumentError | None:
    draft, stands_at = fitted.draft, NO_DOCUMENT if known is None else known.seq
    if draft.if_seq is not None and draft.if_seq != stands_at:
        return _conflict(draft.index, draft.id, draft.if_seq, stands_at)
    without = fitted.own is None and collection.fingerprint == OWN_VECTORS
    if without and (known is None or known.embedded_hash != fitted.embedded_hash):
        missing = InvalidInput("vector: is required, since this collection has no model", param="vector")
        return failure(draft.index, draft.id, missing)
    return None


def _conflict(index: int, document_id: str, expected: int, stands_at: int) -> DocumentError:
    wanted = f"stand at operation {expected}" if expected else "not exist"
    stands = f"stands at {stands_at}" if stands_at else "does not exist"
    error = Conflict(f"if_seq: the document should {wanted}, but {stands}", param="if_seq")
    return failure(index, document_id, error, seq=stands_at)


def _without(prepared: Prepared, conflicts: Mapping[str, int]) -> Outcome:
    """Return what to answer where the ledger left out the documents of *conflicts*."""
    found = [_conflict(prepared.places[id_], id_, prepared.expected[id_], seq) for id_, seq in conflicts.items()]
    outcome = prepared.outcome
    return replace(outcome, accepted=outcome.accepted - len(found), errors=_sorted([*outcome.errors, *found]))


def _stored(fitted: _Fitted, vector: Vector) -> LedgerDocument:
    draft = fitted.draft
    return LedgerDocument(
        id=draft.id,
        text=draft.text,
        title=draft.title,
        metadata=draft.metadata,
        vector=vector,
        content_hash=fitted.content_hash,
        embedded_hash=fitted.embedded_hash,
    )


def _same(fitted: _Fitted, known: KnownDocument | None) -> bool:
    return known is not None and known.content_hash == fitted.content_hash


def _sorted(errors: Sequence[DocumentError]) -> tuple[DocumentError, ...]:
    return tuple(sorted(errors, key=lambda error: error.index))
