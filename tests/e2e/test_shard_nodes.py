"""Two shards, each on two nodes, behind a router on PostgreSQL, as real processes that are killed while searches run."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

DIM = 4
DOCUMENTS = 200


class Process:
    """A search process of some role on a port of its own, which it keeps when it is started again."""

    def __init__(self, place: Path, role: str, ledger_url: str, **environ: str) -> None:
        self._place = place
        self._port_file = place / "port"
        self._role = role
        place.mkdir(parents=True)
        self._port = "0"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SEARCH_")}
        inherited.pop("REDIS_URL", None)
        self._environ = {
            **inherited,
            "SEARCH_DATA_DIR": str(place),
            "SEARCH_LEDGER_URL": ledger_url,
            "SEARCH_PORT_FILE": str(self._port_file),
            "SEARCH_FOLLOW_INTERVAL_S": "0.2",
            "SEARCH_SHUTDOWN_GRACE_S": "2",
            **environ,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, without waiting."""
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "services.search", "--role", self._role]
        with (self._place / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**self._environ, "SEARCH_LISTEN_PORT": self._port}, stdout=log, stderr=log
            )

    async def ready(self) -> None:
        """Wait until it can be asked."""
        give_up_at = time.monotonic() + 60
        while not self._port_file.exists():
            assert self._process is not None
            assert self._process.poll() is None, (self._place / "log").read_text()
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.05)
        self._port = self._port_file.read_text()
        async with httpx2.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{self.url}/readyz")).status_code == 200

    def kill(self) -> None:
        """End it as `kill -9` does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """End it in good order; return the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(20)


@asynccontextmanager
async def cluster(place: Path, ledger_url: str) -> AsyncIterator[tuple[list[list[Process]], httpx2.AsyncClient]]:
    """Start two nodes of two replicas each and a router with the fallback index; yield the nodes and a client."""
    ledger_url = f"{ledger_url}?schema=s{uuid.uuid4().hex[:12]}"
    nodes = [
        [
            Process(
                place / f"{node}{replica}",
                "shard",
                ledger_url,
                SEARCH_SHARD_NODE=str(node),
                SEARCH_SHARD_NODE_COUNT="2",
            )
            for replica in "ab"
        ]
        for node in (0, 1)
    ]
    started = [process for node in nodes for process in node]
    try:
        for process in started:
            process.start()
        for process in started:
            await process.ready()
        addresses = ";".join(",".join(process.url for process in node) for node in nodes)
        router = Process(place / "router", "router", ledger_url, SEARCH_SHARD_NODES=addresses, SEARCH_FALLBACK="local")
        started.append(router)
        router.start()
        await router.ready()
        async with httpx2.AsyncClient(base_url=router.url, trust_env=False, timeout=20) as client:
            yield nodes, client
        assert [process.stop() for process in reversed(started)] == [0] * len(started)
    finally:
        for process in started:
            process.kill()


class Load:
    """Searches one after the other in a few streams; counts what became of them."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client
        self._stop = asyncio.Event()
        self.outcomes: Counter[str] = Counter()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        streams = [asyncio.create_task(self._stream(number)) for number in range(3)]
        try:
            yield self
        finally:
            self._stop.set()
            await asyncio.gather(*streams)

    async def seen(self, outcome: str, *, more: int) -> None:
        """Wait until so many more searches had that outcome."""
        wanted = self.outcomes[outcome] + more
        async with asyncio.timeout(60):
            while self.outcomes[outcome] < wanted:
                await asyncio.sleep(0.02)

    async def _stream(self, number: int) -> None:
        count = number
        while not self._stop.is_set():
            count = (count + 7) % DOCUMENTS
            self.outcomes[await self._ask(count)] += 1
            await asyncio.sleep(0.005)

    async def _ask(self, number: int) -> str:
        body = {"query": f"number{number}", "collection": "notes", "mode": "lexical", "rerank": False, "cache": False}
        reply = await self._client.post("/search", json=body)
        if reply.status_code != 200:
            return f"status {reply.status_code}: {reply.text[:200]}"
        found = reply.json()
        if [hit["id"] for hit in found["hits"]][:1] != [f"n{number}"]:
            return "not found"
        return "flagged" if "fallback_index" in found["degraded"] else "partial" if found["degraded"] else "good"


@pytest.mark.slow
async def test_killed_nodes_cost_no_search(tmp_path: Path, postgres_url: str) -> None:
    """
    With a replica left no search fails or is partial; with none the fallback index answers, flagged.

    Once the nodes are started again everything is as before, and writes are seen through whichever node is asked.
    """
    async with cluster(tmp_path, postgres_url) as (nodes, client):
        made = await client.post("/collections", json={"name": "notes", "dim": DIM, "shards": 2})
        assert made.status_code == 201, made.text
        await write(client, range(DOCUMENTS))
        async with Load(client).running() as load:
            await load.seen("good", more=30)
            nodes[0][0].kill()
            await load.seen("good", more=100)
            assert set(load.outcomes) == {"good"}

            nodes[0][1].kill()
            await load.seen("flagged", more=30)
            assert set(load.outcomes) == {"good", "flagged"}

            for process in nodes[0]:
                process.start()
            for process in nodes[0]:
                await process.ready()
            await load.seen("good", more=100)
            flagged = load.outcomes["flagged"]
            await load.seen("good", more=100)
            assert load.outcomes["flagged"] == flagged
            assert set(load.outcomes) == {"good", "flagged"}

        await write(client, range(DOCUMENTS, DOCUMENTS + 20))
        async with Load(client).running() as load:
            await load.seen("good", more=60)
            assert set(load.outcomes) == {"good"}
        stats = await client.get("/collections/notes/stats")
        assert stats.status_code == 200, stats.text


async def write(client: httpx2.AsyncClient, numbers: range) -> None:
    documents = [
        {"id": f"n{number}", "text": f"note number{number}", "metadata": {}, "vector": [1.0, float(number), 0.0, 1.0]}
        for number in numbers
    ]
    reply = await client.post("/collections/notes/documents", json={"documents": documents})
    assert reply.status_code == 200, reply.text
    assert reply.json()["applied"] is True, reply.text
