"""TercetClient and the command line against the real write side: streams, changes, aliases, copies, exports."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from services.common.errors import DependencyUnavailable
from services.common.wire.documents import WriteProgress
from tercet.cli import app
from tercet.client import IndexingFailed, TercetApiError, TercetClient
from tests.write_stack import WriteStack, write_app, write_stack


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[WriteStack]:
    """A write side without collections."""
    async with write_stack(tmp_path) as made:
        yield made


@pytest.fixture
async def client(stack: WriteStack) -> AsyncIterator[TercetClient]:
    """A client of it."""
    served = write_app(stack)
    transport = httpx2.ASGITransport(app=served, raise_app_exceptions=False)
    async with served.router.lifespan_context(served), TercetClient("http://search", transport=transport) as made:
        yield made


def documents(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"id": f"d{number}", "text": f"text {number}", "metadata": {"n": number}}


async def test_a_stream_writes_any_number_and_tells_how_far_it_is(client):
    """Progress comes with totals; the reply has all errors."""
    told: list[WriteProgress] = []
    bad = {"id": "bad", "text": ""}
    reply = await client.stream("c", [*documents(600), bad], on_progress=told.append)
    assert (reply.accepted, reply.failed, reply.done, [error.id for error in reply.errors]) == (600, 1, True, ["bad"])
    assert told[-1].accepted == 600
    again = await client.stream("c", documents(600), idempotency_key="k")
    assert again.unchanged == 600


async def test_a_stream_that_ends_early_raises(client, stack, monkeypatch):
    """With the error of the line that ended it."""
    await client.write("c", list(documents(1)))
    monkeypatch.setattr("services.search.ingest.RETRY_FIRST_S", 1e9)
    stack.embedding.errors = [DependencyUnavailable("the model is away")]
    with pytest.raises(TercetApiError, match="the model is away"):
        await client.stream("c", documents(9))


async def test_index_names_documents_that_were_refused(client):
    """One of a batch that is left out is an IndexingFailed with its id; the others are written."""
    with pytest.raises(IndexingFailed) as caught:
        await client.index("c", [*documents(3), {"id": "bad", "text": "t", "metadata": {"x": None}}])
    assert caught.value.ids == ("bad",)
    assert (await client.collection("c")).documents == 3


async def test_every_change_has_a_method(client):
    """Patches, deletions, exports, aliases, copies, stats, audits and snapshots come back typed."""
    await client.create_collection("c", metric="cosine", attributes={"n": "number"}, shards=1)
    await client.write("c", list(documents(5)))
    assert (await client.patch_document("c", "d1", {"n": 100})).changed
    assert (await client.delete_documents("c", filter={"n": 100})).deleted == 1
    assert (await client.delete_documents("c", ids=["d0"])).deleted == 1
    assert [each.id async for each in client.export_documents("c", filter={"n": {"$gt": 2}})] == ["d3", "d4"]
    assert await client.set_aliases({"live": "c"}) == {"live": "c"} == await client.aliases()
    await client.reindex("live", "c2", shards=3)
    while (await client.reindex_progress("c2")).state == "copying":
        await asyncio.sleep(0.005)
    assert (await client.collection("c2")).documents == 3
    assert (await client.collection_stats("c2")).hosts["here"][0].documents == 3
    assert (await client.audit("c", repair=True)).clean
    assert (await client.snapshot("c")).hosts["here"]


@pytest.fixture
async def tercet(client, monkeypatch):
    """Return what the command line prints when it talks to the write side, run in a thread of its own."""
    loop = asyncio.get_running_loop()

    class Bridged(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            content = await request.aread()

            async def send() -> tuple[int, dict[str, str], bytes]:
                reply = await client._http.request(
                    request.method, request.url.raw_path.decode(), content=content, headers=request.headers
                )
                return reply.status_code, dict(reply.headers), reply.content

            future = asyncio.run_coroutine_threadsafe(send(), loop)
            status, headers, body = await asyncio.wrap_future(future)
            return httpx2.Response(status, headers=headers, content=body)

    original = TercetClient.__init__

    def bridged(self, url, **options):
        original(self, "http://search", **{**options, "transport": Bridged()})

    monkeypatch.setattr(TercetClient, "__init__", bridged)

    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))

    return run


async def test_the_commands(tercet, tmp_path):
    """Each says what it did, in words."""
    lines = tmp_path / "docs.jsonl"
    lines.write_text('{"id": "a", "text": "one", "n": 1}\n{"id": "b", "text": "two", "n": 2}\n')
    made = await tercet("collections", "create", "c", "--shards", "3", "--attribute", "n=number")
    assert "c: 2 dimensions, cosine, 3 shards, model m" in made.output, made.output
    assert "FIELD=KIND" in (await tercet("collections", "create", "x", "--attribute", "n=text")).output
    indexed = await tercet("index", str(lines), "--collection", "c", "--stream")
    assert "2 documents" in indexed.output, indexed.output
    assert (await tercet("alias", "set", "live", "c")).output == "live -> c\n"
    assert "live" in (await tercet("collections", "list")).output
    shown = (await tercet("collections", "show", "live")).output
    assert "indexed attributes: n=number" in shown
    exported = await tercet("export-documents", "live", "--filter", '{"n": 2}')
    assert exported.output.count("\n") == 1
    assert '"id":"b"' in exported.output
    copied = await tercet("reindex", "live", "c2", "--model", "wide", "--alias", "live")
    assert "2 documents copied, 0 were there, 2 embedded; live means c2 now" in copied.output, copied.output
    audited = await tercet("audit", "c2")
    assert (audited.exit_code, "missing: a" in audited.output) == (1, True)
    assert (await tercet("audit", "c2", "--repair")).exit_code == 0
    assert "as of operation 2" in (await tercet("collections", "snapshot", "c2")).output
    assert (await tercet("alias", "remove", "live")).exit_code == 0
    assert (await tercet("collections", "delete", "c", "--yes")).output == "c is deleted\n"
    assert (await tercet("collections", "show", "c")).exit_code == 1
