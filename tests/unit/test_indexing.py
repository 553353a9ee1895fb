"""The write path over a real SQLite ledger: what is embedded, what is kept, and that a failed write leaves nothing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.common.deadline import NO_DEADLINE
from services.common.errors import Conflict, DependencyUnavailable, InvalidInput, NotFound, Overloaded, Unavailable
from services.common.wire.base import MAX_TEXT_CHARS
from services.common.wire.embedding import EmbedRequest
from services.common.wire.rerank import NativeRerankRequest
from services.search.catalog import OWN_VECTORS, CollectionSettings
from services.search.documents import model_text, own_vector, read_document
from services.search.indexing import Outcome
from services.search.names import WAIT_S, KnownNames
from services.search.ports import Collection, EmbeddingModel
from tests.write_stack import WriteStack, write_stack


class Stack(WriteStack):
    """The write side, and short words for what the tests do with it."""

    async def write(self, *documents: dict[str, Any], name: str = "books") -> Outcome:
        """Write *documents* in one batch."""
        items = [read_document(index, source) for index, source in enumerate(documents)]
        return (await self.indexing.write(name, items, NO_DEADLINE))[1]

    async def vector(self, id_: str, name: str = "books") -> list[float]:
        """Return a stored document's vector."""
        return (await self.changes.get(name, id_)).vector.tolist()

    async def seq(self, name: str = "books") -> int:
        """Return the last operation number."""
        return (await self.ledger.state((await self.catalog.get(name)).uuid)).seq


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """A write side without collections."""
    async with write_stack(tmp_path) as made:
        yield Stack(**vars(made))


def document(id_: str = "a", text: str = "some text", **fields: Any) -> dict[str, Any]:
    """Return a document as it comes in."""
    return {"id": id_, "text": text, **fields}


def errors(outcome: Outcome) -> list[tuple[int, str | None, str | None]]:
    """Return index, id and field of what was left out."""
    return [(error.index, error.id, error.param) for error in outcome.errors]


# --- documents come in ----------------------------------------------------------------------------------------------


async def test_the_first_write_creates_the_collection(stack):
    """A collection comes with its first documents, for the model that is running."""
    reply = await stack.write(document("a"), document("b", "other"))
    assert (reply.accepted, reply.unchanged, reply.embedded, reply.seq) == (2, 0, 2, 2)
    made = await stack.catalog.get("books")
    assert (made.model, made.fingerprint, made.dim, made.shards) == ("m", "m@1", 2, 2)
    assert stack.shards.notified == [2]


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
    assert len(stack.embedding.seen) == 2
    assert stack.shards.notified == [2]


async def test_the_order_of_metadata_keys_is_no_change(stack):
    """Metadata is compared by content."""
    await stack.write(document(metadata={"x": 1, "y": 2}))
    assert (await stack.write(document(metadata={"y": 2, "x": 1}))).unchanged == 1


async def test_changed_metadata_keeps_the_vector(stack):
    """A document whose text is the same is written without the model."""
    await stack.write(document(metadata={"x": 1}))
    before = await stack.vector("a")
    stack.embedding.errors = [DependencyUnavailable("down")]
    reply = await stack.write(document(metadata={"x": 2}))
    assert (reply.unchanged, reply.embedded, reply.seq) == (0, 0, 2)
    assert await stack.vector("a") == before
    assert (await stack.changes.get("books", "a")).metadata == {"x": 2}


async def test_only_new_text_reaches_the_model(stack):
    """Of a batch the model sees the changed texts, each once."""
    await stack.write(document("a"), document("b", "other"))
    stack.embedding.seen.clear()
    reply = await stack.write(document("a"), document("b", "new"), document("c", "new"), document("d", "fourth"))
    assert stack.embedding.seen == ["new", "fourth"]
    assert (reply.unchanged, reply.embedded) == (1, 2)
    assert await stack.vector("b") == await stack.vector("c") != await stack.vector("d")


# --- documents with vectors -----------------------------------------------------------------------------------------


async def test_documents_with_vectors_need_no_model(stack):
    """A collection whose first documents bring vectors has no model; vectors are kept at unit length."""
    stack.embedding.errors = [DependencyUnavailable("down")]
    reply = await stack.write(document("a", vector=[3.0, 4.0, 0.0]), document("b", vector=[0.0, 0.0, 2.0]))
    made = await stack.catalog.get("books")
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
async def test_a_wrong_dimension_leaves_out_that_document(stack, existing, vector):
    """A new collection has the dimension of its first vector; one of another length is named, the rest is written."""
    if existing:
        await stack.write(document("z", "first", vector=[1.0, 0.0]))
    reply = await stack.write(document("a", vector=[1.0, 0.0]), document("b", vector=vector))
    assert (reply.accepted, errors(reply)) == (1, [(1, "b", "vector")])
    assert "this collection has 2" in reply.errors[0].message


async def test_a_first_batch_of_both_kinds_is_held_to_the_models_dimension(stack):
    """In a new collection a document's own vector must fit the model that the others are embedded with."""
    reply = await stack.write(document("b", vector=[1.0, 2.0, 3.0]), document("a"), document("c", vector=[0.0, 2.0]))
    assert (reply.accepted, reply.embedded, errors(reply)) == (2, 1, [(0, "b", "vector")])
    assert await stack.vector("c") == [0.0, 1.0]


async def test_any_finite_length_is_scaled_to_one(stack):
    """Values near the ends of float32 keep their direction."""
    await stack.write(document("a", vector=[3e38, 3e38]), document("b", vector=[3e-10, 4e-10]))
    assert await stack.vector("a") == pytest.approx([0.5**0.5, 0.5**0.5])
    assert await stack.vector("b") == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    "vector", [[0.0, 0.0], [1e-30, 0.0], [1e39, 0.0], [1e300, 0.0]], ids=["zero", "tiny", "large", "huge"]
)
async def test_a_vector_without_direction_is_refused(stack, vector):
    """A vector that has no direction in float32 names its field; no collection is made of it."""
    reply = await stack.write(document(vector=vector))
    assert (reply.accepted, errors(reply)) == (0, [(0, "a", "vector")])
    assert await stack.catalog.find("books") is None


@pytest.mark.parametrize("given", [["1"], [None], [[1.0]], [True, "x"], [float("nan")], [10**400], [], b"abc"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_what_is_no_vector(given, metric):
    """Only finite numbers make one."""
    with pytest.raises(InvalidInput, match=r"^vector: "):
        own_vector(given, None, metric)


async def test_a_collection_without_a_model_needs_vectors(stack):
    """A document that leaves its vector out where no model is, names its field; with its text unchanged it keeps it."""
    await stack.write(document(vector=[1.0, 0.0]))
    reply = await stack.write(document("b", vector=[0.0, 1.0]), document("c", "no vector"))
    assert (reply.accepted, errors(reply)) == (1, [(1, "c", "vector")])
    assert "has no model" in reply.errors[0].message


async def test_two_first_writes_with_other_dimensions(stack):
    """Of two first writes at once one makes the collection; the other is held to its dimension."""
    results = await asyncio.gather(
        stack.write(document("a", vector=[1.0, 0.0])), stack.write(document("b", vector=[1.0, 0.0, 0.0]))
    )
    assert sorted(result.accepted for result in results) == [0, 1]


# --- failures leave nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DependencyUnavailable("down"), Overloaded("full")])
async def test_when_the_model_cannot_be_asked_nothing_is_written(stack, error):
    """The write fails as the embedding service did; there is no document, and no empty collection, of it."""
    stack.embedding.errors = [error]
    with pytest.raises(type(error)):
        await stack.write(document("a"), document("b"))
    assert (await stack.catalog.find("books"), stack.shards.notified) == (None, [])
    assert (await stack.write(document("a"))).seq == 1


async def test_what_the_model_is_needed_for_keeps_the_rest_back(stack):
    """When part of a batch needs the model and the model is away, the part that does not is not written either."""
    await stack.write(document("a", metadata={"x": 1}))
    stack.embedding.errors = [DependencyUnavailable("down")]
    with pytest.raises(DependencyUnavailable):
        await stack.write(document("a", metadata={"x": 2}), document("b", "new"))
    assert await stack.seq() == 1


async def test_another_model_is_a_conflict(stack):
    """A collection never takes vectors of another model; both fingerprints are named."""
    await stack.write(document("a"))
    stack.embedding.models["m"] = EmbeddingModel("m", "m@2", 2)
    with pytest.raises(Conflict, match=r"m@1.*m@2") as caught:
        await stack.write(document("b", "other"))
    assert caught.value.param == "collection"
    assert await stack.seq() == 1


async def test_a_conflict_that_only_the_ledger_sees_is_in_the_outcome(stack):
    """Of two writes with the same condition at once one is stored; the other is told where the document stands."""
    await stack.write(document("a"))
    results = await asyncio.gather(*(stack.write(document("a", f"text {i}", if_seq=1)) for i in range(4)))
    assert sorted(result.accepted for result in results) == [0, 0, 0, 1]
    assert {error.seq for result in results for error in result.errors} == {2}


# --- collections ----------------------------------------------------------------------------------------------------


async def test_a_name_is_taken_once(stack):
    """Of several creations at once one succeeds."""
    results = await asyncio.gather(
        *(stack.catalog.create("books", CollectionSettings(), NO_DEADLINE) for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(result, Conflict) for result in results) == 2


async def test_two_first_writes_share_one_collection(stack):
    """Writes that come at once to a new collection all succeed in it."""
    await asyncio.gather(*(stack.write(document(id_, id_ * 3)) for id_ in "abcd"))
    (described,) = await stack.catalog.describe_all()
    assert (described.name, described.documents, described.seq, described.applied_seq) == ("books", 4, 4, 4)


async def test_a_deleted_collection_is_gone_whoever_looks_meanwhile(stack):
    """A search during the deletion does not bring the collection back, and its name can be used again."""
    await stack.write(document("a"))
    deleting = asyncio.create_task(stack.catalog.delete("books"))
    while not deleting.done():
        await stack.catalog.find("books")
        await asyncio.sleep(0)
    assert await stack.catalog.find("books") is None
    assert stack.shards.forgotten == ["books"]
    assert (await stack.write(document("b"))).seq == 1


async def test_two_deletions_at_once(stack):
    """Deleting a collection twice at once leaves it deleted, and breaks nothing."""
    await stack.write(document("a"))
    results = await asyncio.gather(stack.catalog.delete("books"), stack.catalog.delete("books"), return_exceptions=True)
    assert all(isinstance(result, Collection | NotFound) for result in results)
    assert await stack.catalog.find("books") is None


class SharedLedger:
    """A ledger that others write to as well: what is found under a name, and whether it can be reached."""

    exclusive = False

    def __init__(self) -> None:
        self.found: Collection | None = Collection("u1", "books", "m", "m@1", 2, 2, 0.0)
        self.away = False
        self.hangs = False
        self.asked = 0

    async def find_collection(self, name: str) -> Collection | None:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise Unavailable("restarting")
        return self.found


async def test_names_of_a_shared_ledger_are_read_again_and_outlive_it():
    """For a second a name is known; then it is read again, and while that fails or hangs the old answer serves."""
    ledger, now = SharedLedger(), [0.0]
    names = KnownNames(ledger, clock=lambda: now[0])
    first = await names.find("books")
    assert await names.find("books") is first
    assert ledger.asked == 1
    ledger.found = Collection("u2", "books", "m", "m@1", 2, 2, 0.0)
    now[0] = 1.5
    assert (await names.find("books")).uuid == "u2"
    ledger.away, now[0] = True, 3.0
    assert (await names.find("books")).uuid == "u2"
    with pytest.raises(Unavailable):
        await names.find("unknown")
    ledger.away, ledger.hangs, now[0] = False, True, 5.0
    assert (await names.find("books")).uuid == "u2"
    now[0] = 5.3  # Those who come when the same read is late already do not wait for it.
    async with asyncio.timeout(WAIT_S / 2):
        assert (await names.find("books")).uuid == "u2"
    names.forget()
    ledger.hangs, ledger.found = False, None
    assert await names.find("books") is None


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
