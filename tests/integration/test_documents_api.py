"""Writing, changing and reading documents over HTTP: lists and streams, errors by document, keys, conditions."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgpack
import numpy as np
import orjson
import pytest

from services.common.errors import DependencyUnavailable, Overloaded
from services.common.wire.documents import MAX_DOCUMENT_BYTES
from tests.integration.conftest import serving
from tests.write_stack import WriteStack, write_app, write_stack

DOCS = "/collections/books/documents"
NDJSON = {"content-type": "application/x-ndjson"}
MSGPACK = {"content-type": "application/msgpack"}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[WriteStack]:
    """A write side without collections."""
    async with write_stack(tmp_path) as made:
        yield made


@pytest.fixture
async def http(stack: WriteStack) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the app."""
    async with serving(write_app(stack, max_body_bytes=200_000)) as client:
        yield client


def doc(id_: str, text: str = "some text", **fields: Any) -> dict[str, Any]:
    return {"id": id_, "text": text, **fields}


async def write(http: httpx2.AsyncClient, *documents: Any, key: str | None = None, **params: str) -> httpx2.Response:
    headers = {} if key is None else {"idempotency-key": key}
    return await http.post(DOCS, json={"documents": list(documents)}, headers=headers, params=params)


def lines(*documents: Any) -> bytes:
    return b"".join((each if isinstance(each, bytes) else orjson.dumps(each)) + b"\n" for each in documents)


async def read(http: httpx2.AsyncClient, id_: str, **params: Any) -> dict[str, Any]:
    return (await http.get(f"{DOCS}/{id_}", params=params)).json()


# --- lists


async def test_a_bad_document_leaves_the_others_intact(http):
    """Errors name index, id and field; what is right is written."""
    reply = await write(
        http,
        doc("a"),
        doc("b", metadata={"x": {"deep": 1}}),
        "no object",
        doc("c", vector=[1.0, 2.0, 3.0]),
        doc("a", "again"),
        {**doc("d"), "colour": 1},
        doc("e", vector=["1", "2"]),
        doc("f", vector=[0.0, 0.0]),
        doc("g"),
    )
    assert reply.status_code == 200
    body = reply.json()
    assert (body["accepted"], body["failed"], body["embedded"], body["applied"]) == (2, 7, 1, True)
    found = [(error["index"], error.get("id"), error["code"], error.get("param")) for error in body["errors"]]
    assert found == [
        (1, "b", "invalid_input", "metadata.x"),
        (2, None, "invalid_input", None),
        (3, "c", "invalid_input", "vector"),
        (4, "a", "invalid_input", "id"),
        (5, "d", "invalid_input", "colour"),
        (6, "e", "invalid_input", "vector"),
        (7, "f", "invalid_input", "vector"),
    ]
    assert (await read(http, "g"))["text"] == "some text"


async def test_when_nothing_is_accepted_the_write_is_an_error(http):
    """422 with the usual envelope, which names the first document at fault; all errors beside it. No collection is made."""
    reply = await write(http, doc("a", vector=[]), doc("b", vector=[0.0]))
    assert reply.status_code == 422
    body = reply.json()
    assert body["error"]["param"] == "documents.0.vector"
    assert "(and 1 more)" in body["error"]["message"]
    assert [error["id"] for error in body["errors"]] == ["a", "b"]
    assert (await http.get("/collections/books")).status_code == 404


async def test_large_metadata_is_refused_before_any_model_or_index(stack, tmp_path):
    """5 MB of metadata is an error of its document; the model sees none of it."""
    async with serving(write_app(stack)) as http:
        reply = await write(http, doc("a", metadata={"x": "y" * 5_000_000}))
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["code"] == "too_large"
    assert (stack.embedding.seen, await stack.catalog.find("books")) == ([], None)


async def test_a_list_over_the_bodys_limit_is_refused(http):
    """Lists have a limit as a whole."""
    assert (await write(http, doc("a", "x" * 200_001))).status_code == 413


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"documents": []}', b'{"documents": 1}', b"{", b'{"docs": [1]}'])
async def test_a_body_that_is_no_list_of_documents(http, body):
    """It is refused in the common envelope."""
    reply = await http.post(DOCS, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422)
    assert set(reply.json()) == {"error"}


async def test_attributes_have_kinds(http):
    """A value that its field's kind does not take is an error of that document."""
    made = {"name": "books", "dim": 2, "attributes": {"year": "number", "day": "date"}}
    assert (await http.post("/collections", json=made)).status_code == 201
    reply = await write(
        http,
        doc("a", vector=[1, 0], metadata={"year": "old", "other": "free"}),
        doc("b", vector=[1, 0], metadata={"year": 1999, "day": "2026-05-31"}),
    )
    assert [(error["id"], error["param"]) for error in reply.json()["errors"]] == [("a", "metadata.year")]


async def test_metrics_decide_about_length(http):
    """cosine keeps own vectors at unit length, dot and l2 as they are; where nothing is scaled, zero is a vector."""
    for metric, kept in (("cosine", [0.6, 0.8]), ("dot", [3.0, 4.0]), ("l2", [3.0, 4.0])):
        await http.post("/collections", json={"name": metric, "dim": 2, "metric": metric})
        documents = [doc("a", vector=[3.0, 4.0]), doc("zero", vector=[0, 0]), doc("long", vector=[1e30, 0.0])]
        reply = (await http.post(f"/collections/{metric}/documents", json={"documents": documents})).json()
        refused = [error["id"] for error in reply["errors"]] if reply["failed"] else []
        assert refused == (["zero"] if metric == "cosine" else ["long"])
        found = (await http.get(f"/collections/{metric}/documents/a", params={"vector": True})).json()
        assert found["vector"] == pytest.approx(kept)


# --- conditions and keys


async def test_if_seq_is_per_document(http, stack):
    """A document that stands elsewhere than expected is a conflict with where it stands, and costs no embedding."""
    await write(http, doc("a"), doc("b"))
    stack.embedding.seen.clear()
    reply = await write(http, doc("a", "new a", if_seq=1), doc("b", "new b", if_seq=1), doc("c", if_seq=0))
    body = reply.json()
    assert (body["accepted"], body["seq"]) == (2, 4)
    (error,) = body["errors"]
    assert (error["index"], error["id"], error["code"], error["seq"]) == (1, "b", "conflict", 2)
    assert stack.embedding.seen == ["new a", "some text"]
    alone = await write(http, doc("c", "other", if_seq=0))
    assert (alone.status_code, alone.json()["error"]["code"]) == (409, "conflict")
    assert (await read(http, "b"))["seq"] == 2


async def test_a_repeated_write_is_answered_again(http, stack):
    """The same key and body give the same reply and do nothing, even after the document changed; another body is 409."""
    first = await write(http, doc("a"), doc("b", if_seq=0), doc("bad", vector=[]), key="k1")
    await write(http, doc("a", "changed"))
    again = await write(http, doc("a"), doc("b", if_seq=0), doc("bad", vector=[]), key="k1")
    assert again.json() == first.json()
    assert (await read(http, "a"))["text"] == "changed"
    other = await write(http, doc("a", "third"), key="k1")
    assert (other.status_code, other.json()["error"]["param"]) == (409, "idempotency-key")
    assert (await write(http, doc("a"), key="")).status_code in (200, 422)
    assert (await write(http, doc("a"), key="x" * 256)).status_code == 422


async def test_the_same_write_twice_at_once_is_done_once(http):
    """Of two at once under one key one is done, and both get its reply."""
    await write(http, doc("z"))
    replies = await asyncio.gather(*(write(http, doc("a"), doc("b"), key="k") for _ in range(4)))
    assert len({reply.content for reply in replies}) == 1
    assert replies[0].json()["seq"] == 3


# --- streams


async def test_ndjson_is_written_as_it_comes(http, stack):
    """Any number of documents in one request: bad lines are errors with their index, later ones replace earlier ones."""
    many = [doc(f"d{i}", f"text {i}") for i in range(600)]
    body = lines(*many[:300], b"", b"{broken", *many[300:], doc("d5", "newest"), doc("d6", "text 6"), doc("d6", "x"))
    reply = await http.post(DOCS, content=body, headers=NDJSON)
    assert reply.status_code == 200
    summary = reply.json()
    assert (summary["accepted"], summary["failed"], summary["done"], summary["applied"]) == (603, 1, True, True)
    assert [(error["index"], error["code"]) for error in summary["errors"]] == [(300, "malformed_request")]
    assert [(await read(http, id_))["text"] for id_ in ("d5", "d6", "d599")] == ["newest", "x", "text 599"]
    assert (await http.get("/collections/books")).json()["documents"] == 600


async def test_a_stream_has_no_limit_as_a_whole_but_a_line_has(http, stack):
    """Far more than a body may have goes through; one line over the limit is an error, and the next is read."""
    long = b'{"id": "long", "text": "' + b"x" * MAX_DOCUMENT_BYTES + b'"}'
    body = lines(*(doc(f"d{i}", "y" * 1000) for i in range(400)), long, doc("last"))
    reply = (await http.post(DOCS, content=body, headers=NDJSON)).json()
    assert (reply["accepted"], [(e["index"], e["code"]) for e in reply["errors"]]) == (401, [(400, "too_large")])
    assert (await read(http, "last"))["id"] == "last"


async def test_progress_comes_a_line_a_batch(http):
    """Who takes NDJSON gets totals after each batch, with the errors since, and a last line."""
    body = lines(*(doc(f"d{i}", vector=[1, i]) for i in range(600)), doc("bad", vector=[1]))
    reply = await http.post(DOCS, content=body, headers={**NDJSON, "accept": "application/x-ndjson"})
    assert reply.headers["content-type"] == "application/x-ndjson"
    told = [orjson.loads(line) for line in reply.content.splitlines()]
    assert [line["done"] for line in told] == [False] * (len(told) - 1) + [True]
    assert told[-1]["accepted"] == 600
    assert told[-1]["batches"] == 3
    assert [error["id"] for line in told for error in line["errors"]] == ["bad"]
    assert sorted(line["accepted"] for line in told) == [line["accepted"] for line in told]


@pytest.mark.parametrize("as_list", [False, True])
async def test_msgpack_brings_vectors_as_bytes(http, as_list):
    """Maps one after the other or in an array, in pieces of any size; a vector may be float32 bytes or a list."""
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype("<f4")
    documents = [doc(f"d{i}", vector=v.tobytes() if i % 2 else v.tolist()) for i, v in enumerate(vectors)]
    documents.append(doc("bad", vector=b"123"))
    documents.append({1: 2})
    raw = msgpack.packb(documents) if as_list else b"".join(map(msgpack.packb, documents))

    async def drops() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 37):
            yield raw[start : start + 37]

    reply = await http.post(DOCS, content=drops(), headers=MSGPACK)
    body = reply.json()
    assert (reply.status_code, body["accepted"], [e["index"] for e in body["errors"]]) == (200, 50, [50, 51])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in (6, 7):
        assert (await read(http, f"d{i}", vector=True))["vector"] == pytest.approx(unit[i].tolist(), abs=1e-6)


@pytest.mark.parametrize("tail", [b"\xc1", b"\x81", b"\x92\x01"], ids=["no msgpack", "cut map", "cut array"])
async def test_what_is_no_messagepack_ends_the_stream(http, tail):
    """The batches before it are written; the reply says why it ended and how far it came."""
    raw = b"".join(msgpack.packb(doc(f"d{i}", vector=[1, i])) for i in range(300)) + tail
    reply = await http.post(DOCS, content=raw, headers=MSGPACK)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "malformed_request"
    assert reply.json()["accepted"] == 256
    assert len((await http.get(DOCS, params={"limit": 1000})).json().get("documents", [])) == reply.json()["accepted"]


async def test_a_stream_without_a_valid_document(http):
    """Nothing accepted is an error of the whole; no collection is made."""
    reply = await http.post(DOCS, content=lines(b"{", b"[]"), headers=NDJSON)
    assert (reply.status_code, reply.json()["failed"]) == (422, 2)
    assert (await http.get("/collections/books")).status_code == 404


async def test_a_client_faster_than_the_model_is_slowed(http, stack):
    """While the model is busy no more than a few batches are read, however much the client would send."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for number in range(20 * 256):
            sent = number
            yield lines(doc(f"d{number}", f"text {number}"))

    await write(http, doc("first"))
    stack.embedding.gate.clear()
    stack.embedding.most_under_way = 0
    stack.ingest_task = asyncio.create_task(http.post(DOCS, content=endless(), headers=NDJSON))
    while stack.embedding.under_way == 0:
        await asyncio.sleep(0)
    for _ in range(5000):
        await asyncio.sleep(0)
    assert sent <= 3 * 256
    stack.embedding.gate.set()
    assert (await stack.ingest_task).json()["accepted"] == 20 * 256
    assert stack.embedding.most_under_way <= 3


async def test_a_repeated_stream_passes_over_what_was_acknowledged(http, stack):
    """A stream that broke off is sent again under its key: its finished batches are answered from their receipts."""
    body = [lines(doc(f"d{i}", f"text {i}")) for i in range(600)]

    headers = {**NDJSON, "idempotency-key": "load-1"}
    first = await http.post(DOCS, content=b"".join(body[:512]), headers=headers)
    assert first.json()["accepted"] == 512
    stack.embedding.seen.clear()
    await write(http, doc("d0", "changed since"))
    again = (await http.post(DOCS, content=b"".join(body), headers=headers)).json()
    assert (again["accepted"], again["batches"]) == (600, 3)
    assert len(stack.embedding.seen) == 600 - 512 + 1
    assert (await read(http, "d0"))["text"] == "changed since"
    other = await http.post(DOCS, content=lines(doc("d0", "else")), headers=headers)
    assert other.status_code == 409


async def test_a_busy_model_only_slows_a_stream(http, stack, monkeypatch):
    """What a retry may mend is tried again; the stream goes on."""
    monkeypatch.setattr("services.search.ingest.RETRY_FIRST_S", 0.001)
    await write(http, doc("first"))
    stack.embedding.errors = [Overloaded("full"), DependencyUnavailable("away")]
    reply = await http.post(DOCS, content=lines(doc("a", "a"), doc("b", "b")), headers=NDJSON)
    assert reply.json()["accepted"] == 2


async def test_a_model_that_stays_away_ends_a_stream(http, stack):
    """The reply has the status of what failed, and how far it came."""
    await write(http, doc("first"))
    stack.embedding.errors = [DependencyUnavailable("away")] * 9
    headers = {**NDJSON, "x-deadline-ms": "100"}
    reply = await http.post(DOCS, content=lines(doc("a", "a")), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert reply.json()["accepted"] == 0


# --- changes


async def test_metadata_changes_without_the_model(http, stack):
    """Named fields are set, null removes; text, vector and title stay; saying the same again changes nothing."""
    await write(http, doc("a/b", metadata={"x": 1, "y": "z"}, title="T"))
    before = await read(http, "a%2Fb", vector=True)
    stack.embedding.errors = [DependencyUnavailable("away")] * 9
    patch = {"metadata": {"x": 2, "y": None, "new": ["p"]}}
    reply = await http.patch(f"{DOCS}/a%2Fb", json=patch)
    assert reply.json() == {"collection": "books", "id": "a/b", "changed": True, "seq": 2, "applied": True}
    after = await read(http, "a%2Fb", vector=True)
    assert after == {**before, "metadata": {"x": 2, "new": ["p"]}, "seq": 2}
    assert (await http.patch(f"{DOCS}/a%2Fb", json=patch)).json()["changed"] is False
    assert (await http.patch(f"{DOCS}/a%2Fb", json={**patch, "if_seq": 1})).status_code == 409
    assert (await http.patch(f"{DOCS}/none", json=patch)).status_code == 404
    assert (await http.patch(f"{DOCS}/a%2Fb", json={"metadata": {"x": {}}})).status_code == 422
    again = await write(http, doc("a/b", metadata={"x": 2, "new": ["p"]}, title="T"))
    assert again.json()["unchanged"] == 1


async def test_a_patched_document_with_its_own_vector_keeps_it(http):
    """After a change of metadata the same document with the same vector is unchanged."""
    await write(http, doc("a", vector=[3, 4]))
    await http.patch(f"{DOCS}/a", json={"metadata": {"x": 1}})
    assert (await write(http, doc("a", vector=[3, 4], metadata={"x": 1}))).json()["unchanged"] == 1


async def test_patches_at_once_are_all_kept(http):
    """Changes of different fields at the same time do not undo each other."""
    await write(http, doc("a"))
    await asyncio.gather(*(http.patch(f"{DOCS}/a", json={"metadata": {f"f{i}": i}}) for i in range(6)))
    assert (await read(http, "a"))["metadata"] == {f"f{i}": i for i in range(6)}


async def test_deletion_by_ids_and_by_filter(http, stack):
    """Both say how many there were; a filter goes on until nothing matches, and an empty one is refused."""
    await write(http, *(doc(f"d{i}", metadata={"n": i}) for i in range(20)))
    path = f"{DOCS}/delete"
    assert (await http.post(path, json={"ids": ["d0", "d1", "nope", "d0"]})).json()["deleted"] == 2
    reply = (await http.post(path, json={"filter": {"n": {"$lt": 10}}})).json()
    assert (reply["deleted"], reply["applied"]) == (8, True)
    assert (await http.get("/collections/books")).json()["documents"] == 10
    for body in ({"filter": {}}, {}, {"ids": [], "filter": {"n": 1}}, {"filter": {"n": {"$no": 1}}}):
        assert (await http.post(path, json=body)).status_code == 422
    stack.shards.error = DependencyUnavailable("shard 1 does not answer")
    assert (await http.post(path, json={"filter": {"n": 15}})).status_code == 503
    stack.shards.error, stack.shards.behind = None, True
    assert (await http.post(path, json={"filter": {"n": 15}})).status_code == 504
    assert (await http.delete(f"{DOCS}/d19")).json() == {
        "collection": "books",
        "deleted": 1,
        "seq": 31,
        "applied": False,
    }


async def test_repeated_deletions_and_patches_are_answered_again(http):
    """Under a key the reply is that of the first time."""
    await write(http, doc("a"), doc("b", metadata={"n": 1}))
    key = {"idempotency-key": "k"}
    for body in ({"ids": ["a", "x"]}, {"filter": {"n": 1}}):
        named = {"idempotency-key": f"k{len(str(body))}"}
        first = await http.post(f"{DOCS}/delete", json=body, headers=named)
        again = await http.post(f"{DOCS}/delete", json=body, headers=named)
        assert first.json()["deleted"] == again.json()["deleted"] == 1
    await write(http, doc("c"))
    replies = [await http.patch(f"{DOCS}/c", json={"metadata": {"x": 1}}, headers=key) for _ in range(2)]
    assert [reply.json()["changed"] for reply in replies] == [True, True]
    assert (await http.patch(f"{DOCS}/c", json={"metadata": {"x": 2}}, headers=key)).status_code == 409


async def test_export_pages_and_streams(http):
    """A cursor walks through all documents in the order of their last change; NDJSON has them in one reply."""
    await write(http, *(doc(f"d{i}", f"text {i}", metadata={"n": i}) for i in range(30)))
    await write(http, doc("d3", "changed", metadata={"n": 3}))
    await http.delete(f"{DOCS}/d4")
    seen, cursor = [], None
    while True:
        params = {"limit": 7} if cursor is None else {"limit": 7, "cursor": cursor}
        page = (await http.get(DOCS, params=params)).json()
        seen += [each["id"] for each in page["documents"]]
        if (cursor := page.get("cursor")) is None:
            break
    assert sorted(seen) == sorted(f"d{i}" for i in range(30) if i != 4)
    assert seen[-1] == "d3"
    reply = await http.get(DOCS, params={"filter": '{"n": {"$gte": 28}}'}, headers={"accept": "application/x-ndjson"})
    assert [orjson.loads(line)["id"] for line in reply.content.splitlines()] == ["d28", "d29"]
    assert (await http.get(DOCS, params={"filter": "{"})).status_code == 422
    assert (await http.get("/collections/no/documents", headers={"accept": "application/x-ndjson"})).status_code == 404


async def test_an_export_can_be_written_back(http):
    """What the export's lines hold is what a stream of documents may hold, but for where they stood."""
    await write(http, doc("a", "ä", title="T", metadata={"x": [1 and "p"]}), doc("b"))
    out = await http.get(DOCS, params={"vector": True}, headers={"accept": "application/x-ndjson"})
    copies = [{k: v for k, v in orjson.loads(line).items() if k != "seq"} for line in out.content.splitlines()]
    reply = await http.post("/collections/copy/documents", content=lines(*copies), headers=NDJSON)
    assert reply.json()["accepted"] == 2
