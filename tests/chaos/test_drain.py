"""Starting and stopping real processes: in any order, without a request lost, and used again as soon as they are back."""

import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.postgres_server import PostgresServer, new_schema
from tests.search_process import SearchProcess, ServiceProcess

COLLECTION = "notes"
BACK_WITHIN_S = 5.0
PATIENCE_S = 20.0
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("/search", {"query_vector": [1, 0], "mode": "dense", "rerank": False, "collection": COLLECTION}),
    "embedding": ("/embed", {"inputs": "a text"}),
    "rerank": ("/rerank", {"query": "a question", "documents": ["a text"]}),
}

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture
def processes(tmp_path: Path):
    """Return what makes a service's process (not started) with the fake models; whatever runs at the end is killed."""
    with ExitStack() as stack:

        def make(service: str, **environ: str) -> ServiceProcess:
            models = {"EMBEDDING_MODEL": "fake", "RERANK_MODEL": "fake"}
            if service == "search":
                process: ServiceProcess = SearchProcess(tmp_path / "data", **models, **environ)
            else:
                process = ServiceProcess(service, tmp_path / f"{service}.log", **models, **environ)
            stack.callback(lambda: process.process is None or process.process.poll() is not None or process.kill())
            return process

        yield make


def begin(process: ServiceProcess, path: str, content: bytes) -> socket.socket:
    """Send a request but for its body, and return once the service waits for that."""
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE_S)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nexpect: 100-continue\r\n\r\n"
    )
    connection.sendall(head.encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100")
    return connection


def reply_of(connection: socket.socket) -> bytes:
    """Return all that comes until the service closes the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def turns_away(process: ServiceProcess) -> bool:
    """Whether requests are sent elsewhere: not ready, or nobody listens."""
    try:
        return process.call("GET", "/readyz", timeout_s=2)[0] == 503
    except OSError:
        return True


def until(holds: Callable[[], bool], *, within_s: float = PATIENCE_S) -> None:
    """Wait until *holds*; an assertion fails when it does not in time."""
    give_up_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


@pytest.mark.parametrize("service", REQUESTS)
def test_sigterm_finishes_what_is_under_way(service: str, processes: Callable[..., ServiceProcess]):
    """Told to stop, a service takes no more, answers what it has begun, and ends with status 0."""
    process = processes(service)
    process.start()
    if service == "search":
        process.ask("POST", "/collections", {"name": COLLECTION, "dim": 2})
    path, body = REQUESTS[service]
    content = orjson.dumps(body)
    with closing(begin(process, path, content)) as connection:
        process.process.send_signal(signal.SIGTERM)
        until(lambda: turns_away(process))
        connection.sendall(content)
        assert b"HTTP/1.1 200" in reply_of(connection)
    assert process.process.wait(PATIENCE_S) == 0, process.written()[-3000:]


@pytest.mark.parametrize("service", REQUESTS)
def test_a_request_that_never_ends_does_not_outlive_the_grace(service: str, processes: Callable[..., ServiceProcess]):
    """What is still under way when the grace ends is cut off; the exit status is 0 all the same."""
    process = processes(service, **{f"{service.upper()}_SHUTDOWN_GRACE_S": "1"})
    process.start()
    with closing(begin(process, REQUESTS[service][0], b"12345678")):
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(PATIENCE_S) == 0, process.written()[-3000:]


def test_search_starts_before_those_it_needs(processes: Callable[..., ServiceProcess]):
    """Started first, search is ready and answers by what there is, flagged; each service is used once it is there."""
    embedding, rerank = processes("embedding"), processes("rerank")
    peers = {"SEARCH_EMBEDDING_URL": embedding.url, "SEARCH_RERANK_URL": rerank.url}
    search = processes("search", **peers)
    embedding.start()
    search.start()
    document = {"id": "1", "text": "knead flour and water"}
    search.ask("POST", f"/collections/{COLLECTION}/documents", {"documents": [document]})
    search.stop()
    embedding.stop()

    search.start()

    def flags() -> list[str]:
        answer = search.ask("POST", "/search", {"query": "flour", "collection": COLLECTION, "cache": False})
        assert [hit["id"] for hit in answer["hits"]] == ["1"]
        return sorted(answer["degraded"])

    assert flags() == ["embedding_unavailable", "rerank_unavailable"]
    rerank.start()
    until(lambda: flags() == ["embedding_unavailable"], within_s=BACK_WITHIN_S)
    embedding.start()
    until(lambda: flags() == [], within_s=BACK_WITHIN_S)


def test_nodes_and_router_start_in_any_order(tmp_path: Path, postgres_url: str):
    """A router that starts before its nodes is ready, says that nothing can be searched, and uses them once they are there."""
    ledger_url = new_schema(postgres_url)
    shared = {"SEARCH_LEDGER_URL": ledger_url, "SEARCH_FOLLOW_INTERVAL_S": "0.2"}
    node = SearchProcess(tmp_path / "node", SEARCH_ROLE="shard", **shared)
    router = SearchProcess(tmp_path / "router", SEARCH_ROLE="router", SEARCH_SHARD_NODES=node.url, **shared)
    ask = {"query_vector": [1, 0], "mode": "dense", "rerank": False, "collection": COLLECTION, "cache": False}
    try:
        router.start()
        router.ask("POST", "/collections", {"name": COLLECTION, "dim": 2, "shards": 1})
        assert router.call("POST", "/search", ask)[0] == 503
        node.start()
        until(lambda: router.call("POST", "/search", ask)[0] == 200, within_s=BACK_WITHIN_S)
        document = {"id": "1", "text": "a", "vector": [1, 0]}
        written = router.ask("POST", f"/collections/{COLLECTION}/documents", {"documents": [document]})
        assert written["applied"]
        node.stop()
        node.start()
        until(lambda: router.call("POST", "/search", ask)[0] == 200, within_s=BACK_WITHIN_S)
        assert [hit["id"] for hit in router.ask("POST", "/search", ask)["hits"]] == ["1"]
    finally:
        for process in (node, router):
            if process.process is not None:
                process.kill()


def test_search_waits_for_a_ledger_that_starts_later(tmp_path: Path, postgres_server: PostgresServer):
    """Started before PostgreSQL, search is not ready, or ends so that it is started again; with it there it works."""
    ledger_url = new_schema(postgres_server.url())
    search = SearchProcess(tmp_path / "data", SEARCH_LEDGER_URL=ledger_url)
    postgres_server.stop()
    try:
        process = search.spawn()
        until(lambda: process.poll() is not None or turns_away(search))
    finally:
        postgres_server.start()
    try:
        if process.poll() is not None:
            search.spawn()
        search.until_ready()
        assert search.ask("POST", "/collections", {"name": COLLECTION, "dim": 2})["name"] == COLLECTION
    finally:
        search.kill()
