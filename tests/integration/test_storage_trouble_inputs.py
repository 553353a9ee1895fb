"""The search service over its real ledger and shards, given what no caller should send: it is refused, and harms nothing."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import orjson
import pytest

from services.search.app import create_app
from services.search.settings import SearchSettings
from tercet.client import TercetClient
from tercet.errors import TercetClientError
from tests.integration.conftest import serving
from tests.trouble_service import DIM, document, vector_of

NDJSON = {"content-type": "application/x-ndjson"}
DOCS = "/collections/c/documents"


def app_on(directory: Path, **settings: Any) -> Any:
    """Return the app over *directory*, without model services."""
    nobody = {"embedding_url": "http://127.0.0.1:9", "rerank_url": "http://127.0.0.1:9"}
    return create_app(SearchSettings(data_dir=directory, tail_rows=64, **nobody, **settings))


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with the collection `c`: five documents, and filters by `number` alone."""
    async with serving(app_on(tmp_path / "data")) as client:
        kinds = {"number": "number"}
        await done(client, "POST", "/collections", {"name": "c", "dim": DIM, "shards": 2, "attributes": kinds})
        await done(client, "POST", DOCS, {"documents": [document(number) for number in range(5)]})
        yield client


async def done(http: httpx2.AsyncClient, method: str, path: str, body: Any = None, **options: Any) -> Any:
    """Return the JSON of a request that must succeed."""
    reply = await http.request(method, path, json=body, **options)
    assert reply.status_code < 300, (path, reply.status_code, reply.text[:500])
    return reply.json() if reply.content else None


async def refused(http: httpx2.AsyncClient, path: str, content: bytes | Any, **options: Any) -> dict[str, Any]:
    """Return the error of a POST that must be refused for what it is."""
    raw = content if isinstance(content, bytes) else orjson.dumps(content)
    reply = await http.post(path, content=raw, headers={"content-type": "application/json"}, **options)
    assert 400 <= reply.status_code < 500, (path, reply.status_code, reply.text[:500])
    error: dict[str, Any] = reply.json()["error"]
    assert error["message"]
    return {**error, "status": reply.status_code}


async def stands(http: httpx2.AsyncClient) -> int:
    """Return the collection's operation number."""
    seq: int = (await done(http, "GET", "/collections/c"))["seq"]
    return seq


async def unharmed(http: httpx2.AsyncClient) -> None:
    """What was there is there, and the shards are the ledger's."""
    for number in range(5):
        question = {"collection": "c", "query": f"word{number}x0", "mode": "lexical", "rerank": False, "k": 1}
        answer = await done(http, "POST", "/search", question)
        assert [hit["id"] for hit in answer["hits"]] == [f"d{number}"]
    audit = await done(http, "POST", "/collections/c/audit")
    assert audit["clean"], audit


def search(**fields: Any) -> dict[str, Any]:
    return {"collection": "c", "query": "word1x0", "mode": "lexical", "rerank": False, **fields}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"number": 1}
    for _ in range(depth):
        found = {"$not": found}
    return found


# --- filters


async def test_a_filter_on_a_field_without_index_names_it_and_those_with(http):
    """Search, export and deletion by filter all refuse it with 422, naming it and the fields there are."""
    asks = [
        await refused(http, "/search", search(filter={"colour": "red"})),
        await refused(http, f"{DOCS}/delete", {"filter": {"colour": "red"}}),
    ]
    export = await http.get(DOCS, params={"filter": '{"colour": "red"}'})
    assert export.status_code == 422
    asks.append({**export.json()["error"], "status": 422})
    for error in asks:
        assert error["status"] == 422
        assert "colour" in error["message"]
        assert "number" in error["message"]
    await unharmed(http)


@pytest.mark.parametrize(
    "filter",
    [
        nested(40),
        {"$and": [nested(5)] * 2000},
        {"number": {"$in": list(range(200_000))}},
        {"number": {"$nosuch": 1}},
        {"$or": []},
        {"number": {"$gt": "x"}},
        {"number": {"$gt": None, "$lt": []}},
        {"$not": 3},
    ],
    ids=["deep", "wide", "long list", "unknown operator", "empty or", "kind", "values", "not"],
)
async def test_a_filter_that_cannot_be(http, filter):
    """It is refused with its place, for searches and for deletion alike, and nothing is deleted."""
    before = await stands(http)
    assert (await refused(http, "/search", search(filter=filter)))["status"] in (413, 422)
    assert (await refused(http, f"{DOCS}/delete", {"filter": filter}))["status"] in (413, 422)
    assert await stands(http) == before


async def test_a_filter_of_very_many_brackets(http):
    """Nesting beyond what a parser's stack holds is refused, and the service lives on."""
    deep = b'{"$not":' * 50_000 + b"{}" + b"}" * 50_000
    await refused(http, "/search", b'{"collection":"c","query":"x","filter":' + deep + b"}")
    export = await http.get(DOCS, params={"filter": '{"$not":' * 1000 + "{}" + "}" * 1000})
    assert export.status_code in (400, 414, 422)
    await unharmed(http)


# --- numbers and vectors


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 10**9},
        {"k": -1},
        {"offset": 10**9},
        {"offset": -1},
        {"k": 1000, "offset": 9_001},
        {"k": 2**63},
        {"min_seq": 2**64 - 1},
        {"min_seq": -1},
        {"candidates": 10**6},
        {"query": "a" * 2_000_000},
        {"query": ""},
        {"mode": "dense", "query_vector": [1.0] * (DIM + 1)},
        {"mode": "dense", "query_vector": [0.0] * DIM},
        {"mode": "dense", "query_vector": []},
        {"mode": "dense", "query_vector": [1e300] * DIM},
        {"mode": "dense", "query_vector": ["1"] * DIM},
    ],
    ids=str,
)
async def test_a_search_that_cannot_be(http, fields):
    """Every number and vector out of reach is a 4xx that names the field."""
    error = await refused(http, "/search", search(**fields))
    assert error["status"] in (409, 413, 422)
    named = [key for key in fields if key != "mode"]
    assert any(key in f"{error['param']} {error['message']}" for key in named), error


async def test_not_a_number_in_raw_json(http):
    """NaN and Infinity are no JSON: refused in searches and lists, an error of their own line in a stream."""
    for raw in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        vector = b"[" + b",".join([raw] * DIM) + b"]"
        await refused(http, "/search", b'{"collection":"c","mode":"dense","query_vector":' + vector + b"}")
        await refused(http, DOCS, b'{"documents":[{"id":"x","text":"t","vector":' + vector + b"}]}")
        good = orjson.dumps(document(7)) + b"\n"
        body = good + b'{"id":"x","text":"t","vector":' + vector + b"}\n" + orjson.dumps(document(8))
        reply = await http.post(DOCS, content=body, headers=NDJSON)
        assert reply.status_code == 200, reply.text
        assert (reply.json()["accepted"], [error["index"] for error in reply.json()["errors"]]) == (2, [1])
    await unharmed(http)


@pytest.mark.parametrize("vector", [[1.0] * (DIM - 1), [1.0] * (DIM + 1), [], [0.0] * DIM, [1e39] * DIM, [None] * DIM])
async def test_vectors_that_do_not_fit_are_errors_of_their_documents(http, vector):
    """A wrong dimension, no direction, or more than float32 holds: the document is left out and the others written."""
    documents = [document(10), {**document(11), "vector": vector}, document(12)]
    reply = (await http.post(DOCS, json={"documents": documents})).json()
    assert reply["accepted"] == 2, reply
    assert [(error["index"], error["id"], error["param"].split(".")[0]) for error in reply["errors"]] == [
        (1, "d11", "vector")
    ]
    assert (await http.get(f"{DOCS}/d11")).status_code == 404
    await unharmed(http)


# --- documents


async def test_a_metadata_object_of_5_mb_reaches_no_index(http):
    """It is refused alone, in a list, a stream and a patch, and makes no operation."""
    before = await stands(http)
    large = {"number": 1, "blob": "x" * 5_000_000}
    assert (await refused(http, DOCS, {"documents": [document(20, metadata=large)]}))["status"] in (413, 422)
    body = orjson.dumps(document(20, metadata=large))
    reply = await http.post(DOCS, content=body, headers=NDJSON)
    assert reply.status_code in (413, 422), reply.text[:300]
    many = {"number": 1, **{f"k{n}": "x" * 40_000 for n in range(125)}}
    assert (await refused(http, DOCS, {"documents": [document(20, metadata=many)]}))["status"] in (413, 422)
    reply = await http.patch(f"{DOCS}/d1", json={"metadata": large})
    assert reply.status_code in (413, 422), reply.text[:300]
    assert await stands(http) == before
    await unharmed(http)


IDS = [
    "a/b/c", "/", "a//b", "a/../b", "...", "ö/東京", "x" * 512, "東" * 512, "a b", "a?b=c&d", "a#b", "%2F", "a%00b",
    "tab\there", "'; DROP TABLE documents; --", "delete", '"quoted"', "\\back\\", "🙂", "a\u0301", "\u00e1", "\u202eabc",
]  # fmt: skip


async def test_ids_of_every_kind_are_the_documents_own(http):
    """Slashes, dots, escapes, 512 characters, both forms of an accent: each is written, found, read and deleted as it is."""
    documents = [{**document(100 + place), "id": id_} for place, id_ in enumerate(IDS)]
    reply = await done(http, "POST", DOCS, {"documents": documents})
    assert (reply["accepted"], reply["failed"]) == (len(IDS), 0), reply
    for place, id_ in enumerate(IDS):
        found = await done(http, "GET", f"{DOCS}/{quote(id_, safe='')}")
        assert found["id"] == id_
        answer = await done(http, "POST", "/search", search(query=f"word{100 + place}x0", k=1))
        assert [hit["id"] for hit in answer["hits"]] == [id_]
        vector = vector_of(100 + place)
        answer = await done(http, "POST", "/search", search(query=None, query_vector=vector, mode="dense", k=1))
        assert [hit["id"] for hit in answer["hits"]] == [id_]
    for id_ in IDS:
        assert (await done(http, "DELETE", f"{DOCS}/{quote(id_, safe='')}"))["deleted"] == 1, id_
    await unharmed(http)


@pytest.mark.parametrize("id_", [".", ".."])
async def test_an_id_that_a_path_cannot_carry_is_refused(http, id_):
    """Clients and proxies resolve `.` and `..`: `DELETE …/documents/..` would reach them as that of the collection."""
    error = await refused(http, DOCS, {"documents": [{**document(90), "id": id_}]})
    assert (error["status"], error["param"]) == (422, "documents.0.id")


async def test_a_client_deletes_no_collection_for_a_document(http):
    """`delete_document` with the id `..` deletes no more than that document."""
    async with TercetClient("http://service", transport=http._transport) as client:
        with contextlib.suppress(TercetClientError):
            await client.delete_document("c", "..")
    await unharmed(http)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 513}, "id"),
        ({"id": 7}, "id"),
        ({"id": None}, "id"),
        ({"id": "a\x00b"}, "id"),
        ({"text": ""}, None),
        ({"text": " \n\t"}, None),
        ({"text": None}, "text"),
        ({"metadata": {"a": {"b": 1}}}, "metadata"),
        ({"metadata": {"a": [1, [2]]}}, "metadata"),
        ({"metadata": {"": 1}}, "metadata"),
        ({"text": "a\x00b"}, "text"),
        ({"title": "a\x00b"}, "title"),
        ({"metadata": {"a": "a\x00b"}}, "metadata"),
        ({"metadata": {"number": "seven"}}, "metadata"),
        ({"if_seq": -1}, "if_seq"),
        ({"if_seq": 2**63}, "if_seq"),
    ],
    ids=str,
)
async def test_a_document_that_cannot_be(http, fields, param):
    """It is refused with its field; the other document of the write is stored."""
    documents = [{**document(30), **fields}, document(31)]
    reply = await http.post(DOCS, json={"documents": documents})
    assert reply.status_code == 200, reply.text[:500]
    found = reply.json()
    assert found["accepted"] == 1, found
    assert param is None or (found["errors"][0].get("param") or "").startswith(param), found
    await unharmed(http)


async def test_invalid_utf8_in_a_stream_costs_its_own_line(http):
    """Bytes that are no UTF-8 make an error of their line; the lines around it are written."""
    broken = orjson.dumps(document(51)).replace(b"and some more", b"\xff\xfe\xed\xa0\x80")
    body = b"\n".join([orjson.dumps(document(50)), broken, b"", b"\x00", orjson.dumps(document(52)), b"[]"])
    reply = (await http.post(DOCS, content=body, headers=NDJSON)).json()
    assert reply["accepted"] == 2, reply
    assert [error["index"] for error in reply["errors"]] == [1, 2, 4]
    await unharmed(http)


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson", "application/msgpack"])
async def test_a_compressed_body_is_refused_or_read_and_never_taken_for_documents(http, kind):
    """A body with Content-Encoding is either decoded or refused with a message, never stored as something else."""
    plain = orjson.dumps(document(60)) if kind != "application/json" else orjson.dumps({"documents": [document(60)]})
    headers = {"content-type": kind, "content-encoding": "gzip"}
    reply = await http.post(DOCS, content=gzip.compress(plain), headers=headers)
    if reply.status_code == 200 and reply.json().get("accepted") == 1:
        assert (await http.get(f"{DOCS}/d60")).status_code == 200
    else:
        assert 400 <= reply.status_code < 500, reply.text[:300]
    await unharmed(http)


async def test_an_id_twice_in_a_batch(http):
    """A list refuses the second; in a stream, which has an order, the last one stays."""
    twice = [document(70), document(70, 1)]
    reply = await done(http, "POST", DOCS, {"documents": twice})
    assert (reply["accepted"], reply["errors"][0]["index"]) == (1, 1)
    assert (await done(http, "GET", f"{DOCS}/d70"))["metadata"]["version"] == 0
    body = b"\n".join(orjson.dumps(document(70, version)) for version in range(1, 6))
    reply = (await http.post(DOCS, content=body, headers=NDJSON)).json()
    assert reply["accepted"] == 5
    assert (await done(http, "GET", f"{DOCS}/d70"))["metadata"]["version"] == 5
    await unharmed(http)


# --- keys


async def test_two_streams_at_once_under_one_key_are_one(http):
    """Both are answered with the same documents, and each batch is stored once."""
    before = await stands(http)
    body = b"\n".join(orjson.dumps(document(number)) for number in range(1000, 2200))
    headers = {**NDJSON, "idempotency-key": "twice"}
    both = await asyncio.gather(*(http.post(DOCS, content=body, headers=headers) for _ in range(2)))
    replies = [reply.json() for reply in both]
    assert [reply.status_code for reply in both] == [200, 200], replies
    assert [reply["accepted"] for reply in replies] == [1200, 1200]
    assert await stands(http) == before + 1200
    other = await http.post(DOCS, content=body.replace(b"more", b"less"), headers=headers)
    assert other.status_code == 409, other.text[:300]
    await unharmed(http)
