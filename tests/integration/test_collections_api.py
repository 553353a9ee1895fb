"""Collections over HTTP: settings, aliases, copies into other settings, stats, scopes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from services.common.deadline import NO_DEADLINE
from services.common.errors import Unavailable
from services.search import routes
from services.search.ports import EmbeddingModel, ShardStanding
from tests.integration.conftest import serving
from tests.write_stack import WriteStack, write_app, write_stack


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[WriteStack]:
    """A write side without collections."""
    async with write_stack(tmp_path) as made:
        yield made


@pytest.fixture
async def http(stack: WriteStack) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the app."""
    async with serving(write_app(stack)) as client:
        yield client


async def create(http: httpx2.AsyncClient, name: str, **settings: Any) -> httpx2.Response:
    return await http.post("/collections", json={"name": name, **settings})


async def write(http: httpx2.AsyncClient, name: str, **texts: str) -> dict[str, Any]:
    documents = [{"id": id_, "text": text} for id_, text in texts.items()]
    reply = await http.post(f"/collections/{name}/documents", json={"documents": documents})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def ids(http: httpx2.AsyncClient, name: str) -> dict[str, str]:
    page = (await http.get(f"/collections/{name}/documents", params={"limit": 1000})).json()
    return {each["id"]: each["text"] for each in page["documents"]}


async def copied(http: httpx2.AsyncClient, source: str, target: str, **settings: Any) -> dict[str, Any]:
    """Copy and wait for its end."""
    reply = await http.post(f"/collections/{source}/reindex", json={"target": target, **settings})
    assert reply.status_code == 202, reply.text
    return await ended(http, target)


async def ended(http: httpx2.AsyncClient, target: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (progress := (await http.get(f"/collections/{target}/reindex")).json())["state"] == "copying":
            await asyncio.sleep(0.005)
    return progress


# --- settings


async def test_a_collection_is_described_with_its_settings(http):
    """Model, metric, shards, attributes and language are what was asked for, or the defaults."""
    made = (
        await create(http, "wide", model="wide", metric="l2", shards=5, attributes={"y": "number"}, language="german")
    ).json()
    assert (made["model"], made["fingerprint"], made["dim"]) == ("wide", "wide@1", 3)
    assert (made["metric"], made["shards"], made["attributes"], made["language"]) == (
        "l2",
        5,
        {"y": "number"},
        "german",
    )
    plain = (await create(http, "plain")).json()
    assert (plain["model"], plain["metric"], plain["shards"], plain["attributes"]) == ("m", "cosine", 2, None)
    own = (await create(http, "own", dim=7)).json()
    assert (own["model"], own["fingerprint"], own["dim"]) == (None, "own-vectors", 7)
    listed = (await http.get("/collections")).json()["collections"]
    assert [each["name"] for each in listed] == ["own", "plain", "wide"]


@pytest.mark.parametrize(
    ("settings", "status", "param"),
    [
        ({"metric": "euclid"}, 422, "metric"),
        ({"language": "klingon"}, 422, "language"),
        ({"attributes": {"x": "text"}}, 422, "attributes.x"),
        ({"model": "m", "dim": 4}, 422, "dim"),
        ({"model": "none"}, 404, "model"),
        ({"shards": 0}, 422, "shards"),
    ],
)
async def test_settings_that_cannot_be(http, settings, status, param):
    """Each names its field."""
    reply = await create(http, "x", **settings)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


async def test_creating_again_says_what_differs(http):
    """Always a conflict; one with other settings names them and how to get there."""
    await create(http, "a", shards=2)
    same = (await create(http, "a", shards=2)).json()["error"]
    assert "with these settings" in same["message"]
    reply = await create(http, "a", shards=4, metric="dot")
    assert reply.status_code == 409
    message = reply.json()["error"]["message"]
    assert "shards 2, not 4" in message
    assert "metric 'cosine', not 'dot'" in message
    assert "/collections/a/reindex" in message


async def test_first_writes_may_be_kept_from_creating(tmp_path):
    """With create_on_write off a write to a collection that is not there is 404."""
    async with write_stack(tmp_path, create_on_write=False) as stack, serving(write_app(stack)) as http:
        body = {"documents": [{"id": "a", "text": "t"}]}
        assert (await http.post("/collections/books/documents", json=body)).status_code == 404
        await create(http, "books")
        assert (await http.post("/collections/books/documents", json=body)).status_code == 200


async def test_another_model_is_refused_with_both_names(http, stack):
    """A collection's model by the same name with another fingerprint, or gone, is a conflict that names both."""
    await write(http, "books", a="one")
    stack.embedding.models["m"] = EmbeddingModel("m", "m@2", 2)
    body = {"documents": [{"id": "b", "text": "two"}]}
    reply = await http.post("/collections/books/documents", json=body)
    assert reply.status_code == 409
    assert "m@1" in reply.json()["error"]["message"]
    assert "m@2" in reply.json()["error"]["message"]
    stack.embedding.models.pop("m")
    reply = await http.post("/collections/books/documents", json=body)
    assert reply.status_code == 409
    assert "m@1" in reply.json()["error"]["message"]


async def test_a_collection_keeps_its_model_when_the_default_changes(http, stack):
    """Texts go to the collection's own model by name."""
    await write(http, "books", a="one")
    stack.embedding.default = "wide"
    assert (await write(http, "books", b="two"))["embedded"] == 1
    assert (await create(http, "new")).json()["model"] == "wide"


# --- aliases


async def test_an_alias_is_another_name(http):
    """Writes and reads go through it; it is listed; a collection is not deleted by it."""
    await write(http, "v1", a="one")
    assert (await http.post("/aliases", json={"changes": {"live": "v1"}})).json() == {"aliases": {"live": "v1"}}
    await write(http, "live", b="two")
    assert set(await ids(http, "v1")) == {"a", "b"}
    assert (await http.get("/collections/live")).json()["name"] == "v1"
    assert (await http.get("/collections/v1")).json()["aliases"] == ["live"]
    assert (await http.delete("/collections/live")).status_code == 409
    assert (await create(http, "live")).status_code == 409
    assert (await http.delete("/aliases/live")).status_code == 204
    assert (await http.get("/collections/live")).status_code == 404


async def test_aliases_switch_all_or_none(http):
    """One that cannot be changes none of the others."""
    await write(http, "v1", a="one")
    await write(http, "v2", a="one")
    await http.post("/aliases", json={"changes": {"x": "v1", "y": "v1"}})
    assert (await http.post("/aliases", json={"changes": {"x": "v2", "y": "none"}})).status_code == 404
    assert (await http.post("/aliases", json={"changes": {"x": "v2", "v1": "v2"}})).status_code == 409
    assert (await http.get("/aliases")).json() == {"aliases": {"x": "v1", "y": "v1"}}
    assert (await http.post("/aliases", json={"changes": {"x": "v2", "y": None}})).json() == {"aliases": {"x": "v2"}}
    assert (await http.get("/collections/x")).json()["name"] == "v2"


# --- copies


async def test_a_copy_with_another_model_while_the_old_one_serves(http, stack):
    """The target gets the same documents with its own model's vectors, also those written meanwhile; then the alias."""
    await write(http, "v1", **{f"d{i}": f"text {i}" for i in range(300)})
    await http.post("/aliases", json={"changes": {"live": "v1"}})
    stack.embedding.gate.clear()
    reply = await http.post("/collections/live/reindex", json={"target": "v2", "model": "wide", "alias": "live"})
    assert (reply.status_code, reply.json()["state"]) == (202, "copying")
    again = await http.post("/collections/live/reindex", json={"target": "v2", "model": "wide"})
    assert again.status_code == 409
    await http.delete("/collections/live/documents/d7")
    assert (await http.get("/collections/live")).json()["name"] == "v1"
    stack.embedding.gate.set()
    await write(http, "live", d8="changed", new="newest")
    progress = await ended(http, "v2")
    assert (progress["state"], progress["refused"], progress.get("trouble")) == ("done", 0, None)
    assert progress["position"] == progress["source_seq"]
    live = (await http.get("/collections/live")).json()
    assert (live["name"], live["model"], live["dim"], live["documents"]) == ("v2", "wide", 3, 300)
    assert await ids(http, "v2") == await ids(http, "v1")
    assert (await ids(http, "live"))["d8"] == "changed"


async def test_a_copy_with_other_shards_needs_no_model(http, stack):
    """The same model's vectors are taken over, own vectors among them."""
    await write(http, "v1", a="one", b="two")
    document = {"id": "own", "text": "own", "vector": [3, 4]}
    await http.post("/collections/v1/documents", json={"documents": [document]})
    stack.embedding.seen.clear()
    progress = await copied(http, "v1", "v2", shards=7)
    assert (progress["copied"], progress["embedded"], stack.embedding.seen) == (3, 0, [])
    assert (await http.get("/collections/v2")).json()["shards"] == 7
    reply = await http.post("/collections/v2/documents", json={"documents": [document, {"id": "a", "text": "one"}]})
    assert reply.json()["unchanged"] == 2


async def test_a_copy_goes_on_after_a_crash(http, stack):
    """Started again it passes over what is there, and removes what the source has deleted, even if the log forgot it."""
    await write(http, "v1", **{f"d{i}": f"text {i}" for i in range(10)})
    assert (await copied(http, "v1", "v2", model="wide"))["embedded"] == 10
    await http.post("/collections/v1/documents/delete", json={"ids": ["d1", "d2"]})
    found = await stack.catalog.get("v1")
    await stack.ledger.trim(found.uuid, (await stack.ledger.state(found.uuid)).seq)
    await write(http, "v1", d3="changed")
    stack.embedding.seen.clear()
    progress = await copied(http, "v1", "v2", model="wide")
    assert (progress["copied"], progress["deleted"], progress["unchanged"]) == (1, 2, 7)
    assert stack.embedding.seen == ["changed"]
    assert await ids(http, "v2") == await ids(http, "v1")


async def test_a_copy_takes_nobody_elses_documents(http):
    """A target with other documents, other settings, or that is the source or serves already, is refused."""
    await write(http, "v1", a="one")
    await write(http, "other", z="theirs")
    assert (await http.post("/collections/v1/reindex", json={"target": "other"})).status_code == 409
    assert (await http.post("/collections/v1/reindex", json={"target": "v1"})).status_code == 422
    await create(http, "empty", shards=3)
    assert (await http.post("/collections/v1/reindex", json={"target": "empty", "shards": 4})).status_code == 409
    assert (await http.post("/collections/v1/reindex", json={"target": "x", "alias": "other"})).status_code == 409
    assert (await copied(http, "v1", "v2", alias="live"))["state"] == "done"
    assert (await http.post("/collections/v1/reindex", json={"target": "v2"})).status_code == 409
    assert await ids(http, "other") == {"z": "theirs"}
    assert (await http.get("/collections/nobody/reindex")).status_code == 404


async def test_a_copy_waits_for_what_is_away(http, stack, monkeypatch):
    """While the model does not answer the progress says so; then it goes on."""
    monkeypatch.setattr("services.search.reindexing.FIRST_PAUSE_S", 0.001)
    await write(http, "v1", a="one")
    await create(http, "v2", model="wide")
    stack.embedding.errors = [Unavailable("the model is loading")] * 3
    progress = await copied(http, "v1", "v2", model="wide")
    assert (progress["state"], progress["copied"], progress.get("trouble")) == ("done", 1, None)


async def test_a_copy_can_be_stopped(http, stack):
    """It keeps what it has, and can be started again."""
    await write(http, "v1", a="one")
    await create(http, "v2", model="wide")
    stack.embedding.gate.clear()
    await http.post("/collections/v1/reindex", json={"target": "v2", "model": "wide"})
    assert (await http.delete("/collections/v2/reindex")).json()["state"] == "cancelled"
    stack.embedding.gate.set()
    assert (await copied(http, "v1", "v2", model="wide"))["state"] == "done"


# --- stats, audits, snapshots, scopes


async def test_stats_audit_and_snapshot(http):
    """They tell what each host says of its shards."""
    await write(http, "v1", a="one")
    stats = (await http.get("/collections/v1/stats")).json()
    assert (stats["documents"], stats["seq"], stats["hosts"]["here"][0]["segments"]) == (1, 1, {"tail": 1})
    found = (await http.post("/collections/v1/audit")).json()
    assert (found["clean"], found["hosts"]["here"][0]["differences"]) == (False, {"missing": ["a"]})
    mended = (await http.post("/collections/v1/audit?repair=true")).json()
    assert (mended["clean"], mended["hosts"]["here"][0]["repaired"]) == (True, 1)
    assert (await http.post("/collections/v1/snapshot")).json()["hosts"] == {"here": {"0": 1}}


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/collections/c/documents", "search"),
        ("GET", "/aliases", "search"),
        ("POST", "/search", "search"),
        ("POST", "/search/batch", "search"),
        ("POST", "/collections", "write"),
        ("POST", "/collections/c/documents", "write"),
        ("POST", "/collections/c/documents/delete", "write"),
        ("PATCH", "/collections/c/documents/a/b", "write"),
        ("DELETE", "/collections/c/documents/a", "write"),
        ("DELETE", "/collections/c/documents/x/reindex", "write"),
        ("DELETE", "/collections/c", "admin"),
        ("DELETE", "/collections/c/", "admin"),
        ("POST", "/collections/c/reindex", "admin"),
        ("DELETE", "/collections/c/reindex", "admin"),
        ("POST", "/collections/c/audit", "admin"),
        ("POST", "/collections/c/snapshot", "admin"),
        ("POST", "/aliases", "admin"),
        ("DELETE", "/aliases/a", "admin"),
    ],
)
def test_scopes(method, path, scope):
    """What touches a whole collection is for admins."""
    assert routes.scope_needed(method, path) == scope


async def test_the_overview_outlives_the_ledger(http, stack):
    """Where the ledger cannot be read, the overview says why instead of failing."""
    await write(http, "v1", a="one")
    found, trouble = await stack.catalog.overview()
    assert ([collection.name for collection in found], trouble) == (["v1"], None)
    await stack.ledger.aclose()
    found, trouble = await stack.catalog.overview()
    assert found == []
    assert "closed" in trouble


async def test_stats_outlive_the_ledger(http, stack, monkeypatch):
    """What was last heard of the ledger stands in for it, with the documents of each shard's fullest replica."""
    await write(http, "v1", a="one", b="two")
    collection = await stack.catalog.get("v1")
    held = {"here": [ShardStanding(0, 2, 1), ShardStanding(1, 2, 1)], "there": [ShardStanding(0, 1, 0)]}

    async def standings(collection, deadline):
        return held

    monkeypatch.setattr(stack.shards, "standings", standings)
    await stack.ledger.aclose()
    stats = await stack.catalog.stats(collection, NO_DEADLINE)
    assert (stats.documents, stats.seq, sorted(stats.hosts)) == (2, 2, ["here", "there"])
