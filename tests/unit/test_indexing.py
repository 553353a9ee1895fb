"""The write path over ports that are dictionaries: what is embedded, what is kept, and that a failed write leaves nothing."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import Conflict, DependencyUnavailable, InvalidInput, NotFound, Overloaded
from services.common.wire.base import MAX_TEXT_CHARS
from services.common.wire.documents import Document, WriteReply
from services.common.wire.embedding import EmbedRequest
from services.common.wire.rerank import NativeRerankRequest
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import model_text
from services.search.indexing import Indexing
from services.search.ports import (
    Collection,
    CollectionState,
    Embedded,
    EmbeddingModel,
    KnownDocument,
    LedgerDocument,
)

MODEL = EmbeddingModel("m", "m@1", 2)


class MemoryLedger:
    """A ledger of dictionaries; *slow* makes a deletion give way to other tasks, as a database does."""

    def __init__(self) -> None:
        self.collections: dict[str, Collection] = {}
        self.live: dict[str, dict[str, LedgerDocument]] = {}
        self.seqs: dict[str, int] = {}
        self.appends: list[list[LedgerDocument]] = []

    async def create_collection(self, collection: Collection) -> None:
        if collection.name in self.collections:
            raise Conflict("taken")
        self.collections[collection.name] = collection
        self.live[collection.uuid] = {}
        self.seqs[collection.uuid] = 0

    async def find_collection(self, name: str) -> Collection | None:
        await asyncio.sleep(0)
        return self.collections.get(name)

    async def list_collections(self) -> list[Collection]:
        return list(self.collections.values())

    async def delete_collection(self, uuid: str) -> bool:
        await asyncio.sleep(0.005)
        found = [name for name, collection in self.collections.items() if collection.uuid == uuid]
        for name in found:
            del self.collections[name]
        return bool(found)

    async def append(self, uuid: str, upserts: Sequence[LedgerDocument]) -> int:
        self.appends.append(list(upserts))
        self.live[uuid] |= {document.id: document for document in upserts}
        self.seqs[uuid] += len(upserts)
        return self.seqs[uuid]

    async def delete(self, uuid: str, ids: Sequence[str]) -> tuple[int, int]:
        gone = [self.live[uuid].pop(id_) for id_ in ids if id_ in self.live[uuid]]
        self.seqs[uuid] += len(gone)
        return len(gone), self.seqs[uuid]

    async def known(self, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
        found = await self.documents(uuid, ids)
        return {id_: KnownDocument(d.content_hash, d.embedded_hash, d.vector) for id_, d in found.items()}

    async def documents(self, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
        return {id_: self.live[uuid][id_] for id_ in ids if id_ in self.live[uuid]}

    async def state(self, uuid: str) -> CollectionState:
        if uuid not in {collection.uuid for collection in self.collections.values()}:
            raise NotFound("gone")
        return CollectionState(self.seqs[uuid], len(self.live[uuid]))


class Embedding:
    """The vector of a text says how long it is; *error* makes it fail."""

    def __init__(self) -> None:
        self.model_is = MODEL
        self.error: Exception | None = None
        self.seen: list[str] = []

    async def embed_documents(self, texts: Sequence[str], deadline: Deadline) -> Embedded:
        if self.error:
            raise self.error
        self.seen += texts
        vectors = np.array([[1.0, len(text)] for text in texts], dtype=np.float32)
        return Embedded(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), self.model_is)

    async def model(self, deadline: Deadline) -> EmbeddingModel:
        if self.error:
            raise self.error
        return self.model_is


class Followers:
    """The part of a retriever that writes use."""

    def __init__(self) -> None:
        self.notified: list[int] = []
        self.waited: list[int] = []
        self.forgotten: list[str] = []

    def notify(self, collection: Collection, seq: int) -> None:
        self.notified.append(seq)

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        self.waited.append(seq)
        return True

    async def applied_seq(self, collection: Collection) -> int:
        return max(self.notified, default=0)

    async def forget(self, collection: Collection) -> None:
        self.forgotten.append(collection.name)


class Stack(SimpleNamespace):
    """The write side with the ports it stands on."""

    async def write(self, *documents: Document, name: str = "books", wait: bool = True) -> WriteReply:
        """Write *documents* in one batch."""
        return await self.indexing.write(name, documents, NO_DEADLINE, wait=wait)

    async def vector(self, id_: str, name: str = "books") -> list[float]:
        """Return a stored document's vector."""
        return (await self.indexing.get(name, id_)).vector.tolist()


@pytest.fixture
def stack() -> Stack:
    """A write side without collections."""
    ledger, followers, embedding = MemoryLedger(), Followers(), Embedding()
    catalog = Catalog(ledger, followers, embedding, default_collection="books", default_shards=2)
    indexing = Indexing(catalog, ledger, followers, embedding)
    return Stack(ledger=ledger, followers=followers, embedding=embedding, catalog=catalog, indexing=indexing)


def document(id_: str = "a", text: str = "some text", **fields) -> Document:
    """Return a document as it comes in."""
    return Document(id=id_, text=text, **fields)


# --- documents come in ----------------------------------------------------------------------------------------------


async def test_the_first_write_creates_the_collection(stack):
    """A collection comes with its first documents, for the model that is running."""
    reply = await stack.write(document("a"), document("b", "other"))
    assert (reply.accepted, reply.unchanged, reply.embedded, reply.seq, reply.applied) == (2, 0, 2, 2, True)
    made = stack.ledger.collections["books"]
    assert (made.model, made.fingerprint, made.dim, made.shards) == ("m", "m@1", 2, 2)
    assert (stack.followers.notified, stack.followers.waited) == ([2], [2])


async def test_what_the_model_reads_is_title_and_text(stack):
    """The title goes before the text, unless the text begins with it."""
    await stack.write(document("a", "body", title="Head"), document("b", "Head and body", title="Head"))
    assert stack.embedding.seen == ["Head\nbody", "Head and body"]


async def test_unchanged_documents_make_no_operation(stack):
    """Writing the same again embeds nothing, appends nothing, and tells the operation number there is."""
    documents = [document("a", metadata={"x": 1, "y": ["p"]}), document("b", "other", title="T")]
    await stack.write(*documents)
    reply = await stack.write(*documents)
    assert (reply.accepted, reply.unchanged, reply.embedded, reply.seq) == (2, 2, 0, 2)
    assert len(stack.ledger.appends) == 1
    assert len(stack.embedding.seen) == 2
    assert stack.followers.notified == [2]


async def test_the_order_of_metadata_keys_is_no_change(stack):
    """Metadata is compared by content."""
    await stack.write(document(metadata={"x": 1, "y": 2}))
    assert (await stack.write(document(metadata={"y": 2, "x": 1}))).unchanged == 1


async def test_changed_metadata_keeps_the_vector(stack):
    """A document whose text is the same is written without the model."""
    await stack.write(document(metadata={"x": 1}))
    before = await stack.vector("a")
    stack.embedding.error = DependencyUnavailable("down")
    reply = await stack.write(document(metadata={"x": 2}))
    assert (reply.unchanged, reply.embedded, reply.seq) == (0, 0, 2)
    assert await stack.vector("a") == before
    assert (await stack.indexing.get("books", "a")).metadata == {"x": 2}


async def test_only_new_text_reaches_the_model(stack):
    """Of a batch the model sees the changed texts, each once."""
    await stack.write(document("a"), document("b", "other"))
    stack.embedding.seen.clear()
    reply = await stack.write(document("a"), document("b", "new"), document("c", "new"), document("d", "fourth"))
    assert stack.embedding.seen == ["new", "fourth"]
    assert (reply.unchanged, reply.embedded) == (1, 2)
    assert await stack.vector("b") == await stack.vector("c") != await stack.vector("d")


async def test_without_wait_nobody_is_waited_for(stack):
    """wait=False returns once the ledger has the documents."""
    reply = await stack.write(document(), wait=False)
    assert (reply.applied, stack.followers.waited, stack.followers.notified) == (False, [], [1])


# --- documents with vectors -----------------------------------------------------------------------------------------


async def test_documents_with_vectors_need_no_model(stack):
    """A collection whose first documents bring vectors has no model; vectors are kept at unit length."""
    stack.embedding.error = DependencyUnavailable("down")
    reply = await stack.write(document("a", vector=[3.0, 4.0, 0.0]), document("b", vector=[0.0, 0.0, 2.0]))
    made = stack.ledger.collections["books"]
    assert (made.model, made.fingerprint, made.dim, reply.embedded) == (None, OWN_VECTORS, 3, 0)
    assert await stack.vector("a") == pytest.approx([0.6, 0.8, 0.0])


async def test_a_new_vector_is_a_change(stack):
    """The same text with another vector replaces the document; with the same vector it is unchanged."""
    await stack.write(document(vector=[1.0, 0.0]))
    assert (await stack.write(document(vector=[1.0, 0.0]))).unchanged == 1
    assert (await stack.write(document(vector=[0.0, 1.0]))).unchanged == 0
    assert await stack.vector("a") == [0.0, 1.0]


async def test_a_text_that_had_its_own_vector_is_embedded_when_it_comes_without(stack):
    """In a collection with a model, leaving the vector out means the model's."""
    await stack.write(document("z", "first"))
    await stack.write(document(vector=[1.0, 0.0]))
    assert (await stack.write(document())).embedded == 1
    assert await stack.vector("a") != [1.0, 0.0]


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
@pytest.mark.parametrize("vector", [[1.0, 2.0, 3.0], [1.0]])
async def test_a_wrong_dimension_names_the_field(stack, existing, vector):
    """One vector of another length refuses the whole batch, naming it; nothing is written."""
    if existing:
        await stack.write(document("z", "first", vector=[1.0, 0.0]))
        stack.ledger.appends.clear()
    documents = [document("a", vector=[1.0, 0.0]), document("b", vector=vector)]
    with pytest.raises(InvalidInput, match=r"documents\.1\.vector.*dimensions") as caught:
        await stack.write(*documents)
    assert caught.value.param == "documents.1.vector"
    assert stack.ledger.appends == []
    assert len(stack.ledger.collections) == existing


async def test_a_first_batch_of_both_kinds_is_held_to_the_models_dimension(stack):
    """In a new collection a document's own vector must fit the model that the others are embedded with."""
    with pytest.raises(InvalidInput) as caught:
        await stack.write(document("a"), document("b", vector=[1.0, 2.0, 3.0]))
    assert caught.value.param == "documents.1.vector"
    assert (stack.ledger.appends, stack.ledger.collections) == ([], {})
    assert (await stack.write(document("a"), document("b", vector=[0.0, 2.0]))).embedded == 1
    assert await stack.vector("b") == [0.0, 1.0]


async def test_any_finite_length_is_scaled_to_one(stack):
    """Values near the ends of float32 keep their direction."""
    await stack.write(document("a", vector=[3e38, 3e38]), document("b", vector=[3e-10, 4e-10]))
    assert await stack.vector("a") == pytest.approx([0.5**0.5, 0.5**0.5])
    assert await stack.vector("b") == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    "vector", [[0.0, 0.0], [1e-30, 0.0], [1e39, 0.0], [1e300, 0.0]], ids=["zero", "tiny", "large", "huge"]
)
async def test_a_vector_without_direction_is_refused(stack, vector):
    """A vector that has no direction in float32 names its field."""
    with pytest.raises(InvalidInput, match="not all zero") as caught:
        await stack.write(document(vector=vector))
    assert caught.value.param == "documents.0.vector"
    assert stack.ledger.collections == {}


async def test_a_collection_without_a_model_needs_vectors(stack):
    """A document that leaves its vector out where no model is, names its field; nothing of the batch is written."""
    await stack.write(document(vector=[1.0, 0.0]))
    with pytest.raises(InvalidInput, match="has no model") as caught:
        await stack.write(document("b", vector=[0.0, 1.0]), document("c", "no vector"))
    assert caught.value.param == "documents.1.vector"
    assert len(stack.ledger.appends) == 1


async def test_two_first_writes_with_other_dimensions(stack):
    """Of two first writes at once one makes the collection; the other is held to its dimension."""
    results = await asyncio.gather(
        stack.write(document("a", vector=[1.0, 0.0])),
        stack.write(document("b", vector=[1.0, 0.0, 0.0])),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["InvalidInput", "WriteReply"]
    assert len(stack.ledger.appends) == 1


# --- failures leave nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DependencyUnavailable("down"), Overloaded("full")])
async def test_when_the_model_cannot_be_asked_nothing_is_written(stack, error):
    """The write fails as the embedding service did; there is no document, and no empty collection, of it."""
    stack.embedding.error = error
    with pytest.raises(type(error)):
        await stack.write(document("a"), document("b"))
    assert (stack.ledger.appends, stack.ledger.collections, stack.followers.notified) == ([], {}, [])
    stack.embedding.error = None
    assert (await stack.write(document("a"))).seq == 1


async def test_a_batch_is_all_or_nothing(stack):
    """When part of a batch needs the model and the model is away, the part that does not is not written either."""
    await stack.write(document("a", metadata={"x": 1}))
    stack.embedding.error = DependencyUnavailable("down")
    with pytest.raises(DependencyUnavailable):
        await stack.write(document("a", metadata={"x": 2}), document("b", "new"))
    assert len(stack.ledger.appends) == 1


async def test_another_model_is_a_conflict(stack):
    """A collection never takes vectors of another model; both fingerprints are named."""
    await stack.write(document("a"))
    stack.embedding.model_is = EmbeddingModel("m", "m@2", 2)
    with pytest.raises(Conflict, match=r"m@1.*m@2") as caught:
        await stack.write(document("b"))
    assert caught.value.param == "collection"
    assert len(stack.ledger.appends) == 1


# --- documents go out -----------------------------------------------------------------------------------------------


async def test_deleting_passes_over_what_is_not_there(stack):
    """The reply tells how many there were; a deletion of nothing makes no operation."""
    await stack.write(document("a"), document("b"))
    reply = await stack.indexing.delete("books", ["a", "nobody"], NO_DEADLINE, wait=True)
    assert (reply.deleted, reply.seq, reply.applied) == (1, 3, True)
    assert (await stack.indexing.delete("books", ["nobody"], NO_DEADLINE, wait=False)).seq == 3
    assert stack.followers.notified == [2, 3]
    with pytest.raises(NotFound):
        await stack.indexing.get("books", "a")


async def test_a_missing_document_or_collection_is_not_found(stack):
    """The error names which of the two is missing."""
    with pytest.raises(NotFound, match="none yet") as caught:
        await stack.indexing.get("books", "a")
    assert caught.value.param == "collection"
    await stack.write(document("a"))
    with pytest.raises(NotFound) as caught:
        await stack.indexing.get("books", "b")
    assert caught.value.param == "id"


# --- collections ----------------------------------------------------------------------------------------------------


async def test_a_name_is_taken_once(stack):
    """Creating a collection that exists is a conflict; of two at once one is made."""
    results = await asyncio.gather(
        *(stack.catalog.create("books", NO_DEADLINE) for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(result, Conflict) for result in results) == 2
    with pytest.raises(Conflict) as caught:
        await stack.catalog.create("books", NO_DEADLINE)
    assert caught.value.param == "name"


async def test_two_first_writes_share_one_collection(stack):
    """Writes that come at once to a new collection all succeed in it."""
    await asyncio.gather(*(stack.write(document(id_, id_ * 3)) for id_ in "abcd"))
    assert len(stack.ledger.collections) == 1
    assert set(stack.ledger.live[stack.ledger.collections["books"].uuid]) == set("abcd")


async def test_a_deleted_collection_is_gone_whoever_looks_meanwhile(stack):
    """A search during the deletion does not bring the collection back, and its name can be used again."""
    await stack.write(document("a"))
    deleting = asyncio.create_task(stack.catalog.delete("books"))
    while not deleting.done():
        await stack.catalog.find("books")
        await asyncio.sleep(0)
    assert await stack.catalog.find("books") is None
    assert stack.followers.forgotten == ["books"]
    assert (await stack.write(document("b"))).seq == 1


async def test_two_deletions_at_once(stack):
    """Deleting a collection twice at once leaves it deleted, and breaks nothing."""
    await stack.write(document("a"))
    results = await asyncio.gather(stack.catalog.delete("books"), stack.catalog.delete("books"), return_exceptions=True)
    assert all(isinstance(result, Collection | NotFound) for result in results)
    assert await stack.catalog.find("books") is None


async def test_a_collection_is_described(stack):
    """Its description has the live count and how far the shards are."""
    await stack.write(document("a"), document("b"))
    (described,) = await stack.catalog.describe_all()
    assert (described.name, described.documents, described.seq, described.applied_seq) == ("books", 2, 2, 2)


# --- what a model reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "text", "read"),
    [
        (None, "body", "body"),
        ("", "body", "body"),
        ("Head", "body", "Head\nbody"),
        ("Head", "Head: body", "Head: body"),
        ("Head", "", "Head"),
    ],
)
def test_model_text(title, text, read):
    """A model reads the title and the text, and no title twice."""
    assert model_text(title, text) == read


@pytest.mark.parametrize(("title", "text"), [("t" * 50, "x" * MAX_TEXT_CHARS), ("t" * (MAX_TEXT_CHARS + 9), "x")])
def test_what_a_model_reads_is_never_over_its_services_limit(title, text):
    """A title with the longest text allowed is still a text that the model services take."""
    read = model_text(title, text)
    assert EmbedRequest(inputs=[read]).texts() == [read]
    assert NativeRerankRequest(query="q", documents=[read]).texts() == [read]
