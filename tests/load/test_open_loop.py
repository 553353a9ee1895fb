"""The short form of the load tests: a burst that one search process cannot take, from the open-loop generator."""

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from benchmarks.open_loop import OpenPlan, OpenResult, run
from tests.search_process import SearchProcess

pytestmark = [pytest.mark.slow, pytest.mark.alone]
WORDS = ["tides", "bread", "glacier", "violin", "bees", "fever", "solar", "harbour"]


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[SearchProcess]:
    """A search process that does one search at once and lets four wait, with a small collection that needs no model."""
    process = SearchProcess(tmp_path / "search", SEARCH_MAX_CONCURRENT_SEARCHES="1", SEARCH_MAX_WAITING_SEARCHES="4")
    process.start()
    try:
        process.ask("POST", "/collections", {"name": "books", "dim": 2})
        documents = [{"id": word, "text": f"about {word}", "vector": [1.0, i]} for i, word in enumerate(WORDS)]
        process.ask("POST", "/collections/books/documents", {"documents": documents})
        yield process
    finally:
        process.stop()


def burst(process: SearchProcess, bodies: Path) -> OpenResult:
    """Send 600 searches within a fifth of a second; whoever waits is patient."""
    questions = [{"query": word, "collection": "books", "mode": "lexical", "rerank": False} for word in WORDS]
    bodies.write_bytes(b"\n".join(orjson.dumps({**one, "cache": False, "timeout_ms": 30_000}) for one in questions))
    plan = OpenPlan("127.0.0.1", process.port, "/search", str(bodies), 3000, 0.2, 30_000, arrivals="constant")
    return run(plan)


def metric(process: SearchProcess, name: str) -> float:
    """Return the value of one series."""
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def test_a_burst_is_answered_or_refused_and_leaves_nothing_behind(narrow: SearchProcess, tmp_path: Path) -> None:
    """Each of 600 is a 200 or a 429, the refused are counted, and then nothing waits or is under way."""
    result = burst(narrow, tmp_path / "bodies")
    assert set(result.statuses) == {"200", "429"}
    assert sum(result.statuses.values()) == 600
    assert metric(narrow, 'tercet_shed_total{priority="normal"}') == result.statuses["429"]
    assert metric(narrow, "tercet_admission_waiting") == 0
    assert metric(narrow, "tercet_admission_in_flight") == 0
    assert narrow.ask("POST", "/search", {"query": "bees", "collection": "books", "mode": "lexical"})["hits"]


def test_the_generator_accounts_for_every_request(narrow: SearchProcess, tmp_path: Path) -> None:
    """What it offered it sent, and each has one outcome; good answers are what it measured; it tells its own CPU time."""
    result = burst(narrow, tmp_path / "bodies")
    assert result.offered_per_s == result.sent_per_s == 3000
    assert result.answered_per_s == 3000
    assert result.goodput_per_s * 0.2 == pytest.approx(result.statuses["200"])
    assert sum(result.good_by_second) == result.statuses["200"]
    assert 0 < result.p50_ms <= result.p99_ms <= result.max_ms
    assert result.cpu_s > 0


@pytest.mark.parametrize("closes", [False, True])
def test_the_generator_ends_though_nobody_answers(closes: bool, tmp_path: Path) -> None:
    """A server whose backlog is full, and one that closes what it accepts, cost their requests and not the run."""
    (tmp_path / "bodies").write_bytes(b"{}")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        accepting = threading.Thread(target=_close_all, args=(server,), daemon=True)
        if closes:
            accepting.start()
        plan = OpenPlan("127.0.0.1", server.getsockname()[1], "/", str(tmp_path / "bodies"), 1000, 0.3, 500)
        result = run(plan)
        assert sum(result.statuses.values()) == round(result.offered_per_s * plan.duration_s)
        assert set(result.statuses) <= ({"lost", "unanswered"} if closes else {"unanswered"})
        if closes:
            server.shutdown(socket.SHUT_RDWR)
            accepting.join()


def _close_all(server: socket.socket) -> None:
    """Accept and close until *server* is shut down."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        connection.close()
