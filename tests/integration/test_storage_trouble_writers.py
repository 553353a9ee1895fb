"""Writers of every kind at once over the real ledger and shards: what is there at the end is what a model says."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import orjson
import pytest

from services.search.app import create_app
from services.search.settings import SearchSettings
from tests.integration.conftest import serving
from tests.trouble_service import DIM, document, vector_of

DOCS = "/collections/c/documents"
NDJSON = {"content-type": "application/x-ndjson"}
ROUNDS = 40


@pytest.fixture
async def http(tmp_path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with the empty collection `c` of two shards, with small segments and many snapshots."""
    nobody = {"embedding_url": "http://127.0.0.1:9", "rerank_url": "http://127.0.0.1:9"}
    small = {"tail_rows": 32, "hnsw_rows": 200, "snapshot_operations": 50, "maintenance_share": 1.0}
    async with serving(create_app(SearchSettings(data_dir=tmp_path / "data", **nobody, **small))) as client:
        await done(client, "POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
        yield client


async def done(http: httpx2.AsyncClient, method: str, path: str, body: Any = None, **options: Any) -> Any:
    reply = await http.request(method, path, json=body, **options)
    assert reply.status_code < 300, (path, reply.status_code, reply.text[:500])
    return reply.json() if reply.content else None


async def export(http: httpx2.AsyncClient, collection: str = "c", limit: int = 50) -> dict[str, dict[str, Any]]:
    """Return all documents by id, read page after page."""
    found, cursor = {}, None
    while True:
        params = {"limit": str(limit)} | ({} if cursor is None else {"cursor": cursor})
        page = (await http.get(f"/collections/{collection}/documents", params=params)).json()
        found |= {each["id"]: each for each in page["documents"]}
        if (cursor := page.get("cursor")) is None:
            return found


class Writer:
    """Changes documents of its own, one after the other, and keeps what they are by then."""

    def __init__(self, http: httpx2.AsyncClient, number: int) -> None:
        self.http = http
        self.ids = list(range(number * 1000, number * 1000 + 60))
        self.random = random.Random(number)
        self.number = number
        self.now: dict[int, dict[str, Any]] = {}
        self.version = 0

    async def step(self) -> None:
        chosen = self.random.sample(self.ids, self.random.randint(1, 20))
        self.version += 1
        await self.random.choice([self.write, self.stream, self.delete, self.delete_by_filter, self.patch])(chosen)

    def made(self, id_: int) -> dict[str, Any]:
        metadata = {"writer": self.number, "group": self.random.randint(0, 4), "version": self.version}
        return document(id_, self.version, metadata=metadata)

    async def write(self, chosen: list[int]) -> None:
        made = {id_: self.made(id_) for id_ in chosen}
        wait = self.random.choice(["applied", "acknowledged"])
        reply = await done(self.http, "POST", DOCS, {"documents": list(made.values())}, params={"wait": wait})
        assert reply["accepted"] == len(made)
        self.now |= made

    async def stream(self, chosen: list[int]) -> None:
        made = {id_: self.made(id_) for id_ in chosen}
        body = b"\n".join(orjson.dumps(each) for each in made.values())
        reply = (await self.http.post(DOCS, content=body, headers=NDJSON)).json()
        assert reply["accepted"] == len(made), reply
        self.now |= made

    async def delete(self, chosen: list[int]) -> None:
        gone = [id_ for id_ in chosen if id_ in self.now]
        reply = await done(self.http, "POST", f"{DOCS}/delete", {"ids": [f"d{id_}" for id_ in chosen]})
        assert reply["deleted"] == len(gone)
        for id_ in gone:
            del self.now[id_]

    async def delete_by_filter(self, chosen: list[int]) -> None:
        group = self.random.randint(0, 4)
        gone = [id_ for id_, each in self.now.items() if each["metadata"]["group"] == group]
        filter = {"writer": self.number, "group": group}
        reply = await done(self.http, "POST", f"{DOCS}/delete", {"filter": filter})
        assert reply["deleted"] == len(gone), (reply, len(gone))
        for id_ in gone:
            del self.now[id_]

    async def patch(self, chosen: list[int]) -> None:
        for id_ in chosen[:3]:
            group = self.random.randint(0, 4)
            reply = await self.http.patch(f"{DOCS}/d{id_}", json={"metadata": {"group": group, "version": None}})
            if id_ not in self.now:
                assert reply.status_code == 404
                continue
            assert reply.status_code == 200, reply.text
            metadata = {key: value for key, value in self.now[id_]["metadata"].items() if key != "version"}
            self.now[id_] = {**self.now[id_], "metadata": {**metadata, "group": group}}


async def same(http: httpx2.AsyncClient, writers: list[Writer]) -> None:
    """The ledger's documents are the writers' models, and the shards are the ledger's."""
    expected = {each["id"]: each for writer in writers for each in writer.now.values()}
    found = await export(http)
    assert found.keys() == expected.keys()
    for id_, each in expected.items():
        assert (found[id_]["text"], found[id_]["metadata"]) == (each["text"], each["metadata"])
    state = await done(http, "GET", "/collections/c")
    assert state["documents"] == len(expected)
    for writer in writers:
        for group in range(5):
            wanted = {each["id"] for each in writer.now.values() if each["metadata"]["group"] == group}
            filter = {"writer": writer.number, "group": group}
            body = {"collection": "c", "mode": "dense", "query_vector": vector_of(1), "k": 1000, "filter": filter}
            answer = await done(http, "POST", "/search", {**body, "rerank": False, "min_seq": state["seq"]})
            assert {hit["id"] for hit in answer["hits"]} == wanted
    audit = await done(http, "POST", "/collections/c/audit")
    assert audit["clean"], audit


async def test_writers_of_every_kind_at_once(http):
    """Lists, streams, deletions by id and by filter and patches by four writers come to what each of them did."""
    writers = [Writer(http, number) for number in range(4)]

    async def work(writer: Writer) -> None:
        for _ in range(ROUNDS):
            await writer.step()

    await asyncio.gather(*map(work, writers))
    await same(http, writers)


async def test_an_export_amid_writers_misses_nothing_that_stood_still(http):
    """Whatever changes meanwhile, documents that nobody touches are in every export, and no deleted one comes back."""
    still = [document(number) for number in range(50_000, 50_300)]
    for start in range(0, 300, 100):
        await done(http, "POST", DOCS, {"documents": still[start : start + 100]})
    writers = [Writer(http, number) for number in range(2)]
    over = False

    async def work(writer: Writer) -> None:
        while not over:
            await writer.step()

    working = [asyncio.create_task(work(writer)) for writer in writers]
    try:
        for _ in range(5):
            found = await export(http, limit=37)
            assert {each["id"] for each in still} <= found.keys()
    finally:
        over = True
        await asyncio.gather(*working)
    found = await export(http, limit=7)
    assert found.keys() == {each["id"] for each in still} | {each["id"] for w in writers for each in w.now.values()}


async def test_counters_by_if_seq_lose_no_increment(http):
    """Many callers that read, add one and write with `if_seq` add up: of two at once one is told to read again."""
    await done(http, "POST", DOCS, {"documents": [document(1, metadata={"count": 0})]})
    conflicts = 0

    async def add(times: int, patching: bool) -> None:
        nonlocal conflicts
        while times:
            found = await done(http, "GET", f"{DOCS}/d1")
            metadata = {"count": found["metadata"]["count"] + 1}
            if patching:
                reply = await http.patch(
                    f"{DOCS}/d1", json={"metadata": metadata, "if_seq": found["seq"]}, params={"wait": "acknowledged"}
                )
            else:
                body = {"documents": [document(1, metadata=metadata, if_seq=found["seq"])]}
                reply = await http.post(DOCS, json=body, params={"wait": "acknowledged"})
            assert reply.status_code in (200, 409), reply.text
            times -= reply.status_code == 200
            conflicts += reply.status_code == 409

    await asyncio.gather(*(add(10, bool(number % 2)) for number in range(8)))
    assert (await done(http, "GET", f"{DOCS}/d1"))["metadata"]["count"] == 80
    assert conflicts > 0


async def test_a_document_changed_amid_a_deletion_by_filter_is_judged_as_it_then_is(http):
    """A document that no longer matches when its turn comes stays; all that match are gone."""
    for start in range(0, 2000, 500):
        documents = [document(number, metadata={"state": "old"}) for number in range(start, start + 500)]
        await done(http, "POST", DOCS, {"documents": documents})

    async def rescue() -> list[int]:
        saved = []
        for number in range(1990, 1500, -7):
            reply = await http.patch(
                f"{DOCS}/d{number}", json={"metadata": {"state": "new"}}, params={"wait": "acknowledged"}
            )
            if reply.status_code == 200:
                saved.append(number)
        return saved

    deleting = asyncio.create_task(done(http, "POST", f"{DOCS}/delete", {"filter": {"state": "old"}}))
    saved = await rescue()
    reply = await deleting
    found = await export(http, limit=1000)
    assert {each["id"] for each in found.values() if each["metadata"]["state"] == "old"} == set()
    assert found.keys() == {f"d{number}" for number in saved}
    assert reply["deleted"] == 2000 - len(saved)
    assert (await done(http, "POST", "/collections/c/audit"))["clean"]
