"""Streams into and out of a real search service: callers that stop, go away or send faster than it stores."""

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator

import orjson
import pytest

from tests.trouble_service import DIM, TroubledService, document, searching, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SLOW = pytest.mark.skipif(not os.environ.get("TERCET_SLOW"), reason="takes minutes: set TERCET_SLOW=1")
DOCS = "/collections/c/documents"
MiB = 2**20


@pytest.fixture
def service(tmp_path) -> Iterator[TroubledService]:
    """A service with the empty collection `c` of two shards."""
    settings = {"SEARCH_TAIL_ROWS": "4096", "SEARCH_HNSW_ROWS": "10000", "SEARCH_SHUTDOWN_GRACE_S": "2"}
    with searching(tmp_path / "data", **settings) as started:
        started.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
        yield started


def begin(
    service: TroubledService, *, accept: str = "application/json", receive_buffer: int | None = None
) -> socket.socket:
    """Open a connection and send the head of a stream of NDJSON in chunks."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", service.port))
    head = f"POST {DOCS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\naccept: {accept}\r\n"
    connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    return connection


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def lines(numbers: range, version: int = 0) -> bytes:
    return b"".join(orjson.dumps(document(number, version)) + b"\n" for number in numbers)


def tasks_at_rest(service: TroubledService) -> None:
    """No request is under way any more: a graceful end has nothing to wait for."""
    began = time.monotonic()
    service.stop()
    assert time.monotonic() - began < 20
    service.start()


def test_a_stream_that_is_cut_keeps_what_was_stored(service):
    """A connection cut amid a line: whole batches acknowledged before stay, the half line is no document, shards agree."""
    connection = begin(service, accept="application/x-ndjson")
    connection.sendall(chunk(lines(range(2000))))
    heard = b""
    while b'"batches":' not in heard:
        heard += connection.recv(65536)
    acknowledged = max(
        orjson.loads(line)["accepted"] for line in heard.splitlines() if line.startswith(b"{") and line.endswith(b"}")
    )
    connection.sendall(chunk(orjson.dumps(document(5000))[:40]))
    connection.close()
    assert acknowledged >= 256
    until(lambda: service.ask("GET", "/collections/c")["documents"] >= acknowledged)
    for number in (0, acknowledged - 1):
        assert service.ask("GET", f"{DOCS}/d{number}")["metadata"]["number"] == number
    assert service.call("GET", f"{DOCS}/d5000")[0] == 404
    tasks_at_rest(service)
    assert service.ask("GET", "/collections/c")["documents"] >= acknowledged
    assert service.ask("POST", "/collections/c/audit")["clean"]


def test_many_callers_that_go_away_leave_nothing_behind(service):
    """Streams cut at the head, in a chunk's size and in a line cost no handle, thread or task that stays."""

    def cut(count: int) -> None:
        for number in range(count):
            connection = begin(service)
            connection.sendall((b"", b"5", chunk(b'{"id": "x'), chunk(lines(range(3))))[number % 4])
            connection.close()

    cut(40)
    until(lambda: service.open_files < 80)
    handles, threads, memory = service.open_files, service.threads, service.rss_bytes
    cut(400)
    until(lambda: service.open_files <= handles + 5)
    assert service.threads <= threads + 4
    assert service.rss_bytes < memory + 40 * MiB
    service.write(range(10))
    tasks_at_rest(service)


def test_a_caller_that_stops_sending_holds_up_nobody(service):
    """Streams that stand still keep others from nothing, and the service still ends when it is told to."""
    still = [begin(service) for _ in range(20)]
    for connection in still:
        connection.sendall(chunk(lines(range(5)) + b'{"id": '))
    service.write(range(100, 130))
    assert service.search(110)["hits"][0]["id"] == "d110"
    for connection in still[:10]:
        connection.close()
    service.stop()
    for connection in still[10:]:
        connection.close()
    service.start()
    assert service.search(110)["hits"][0]["id"] == "d110"


def test_a_caller_that_does_not_read_its_progress_does_not_fill_memory(service):
    """Errors of documents are told in lines that nobody reads: the stream goes on, and memory stays bounded."""
    connection = begin(service, accept="application/x-ndjson", receive_buffer=4096)
    wrong = chunk(b'{"id": "x", "text": 7}\n' * 2000 + lines(range(10)))
    service.write(range(10))
    before = service.rss_bytes
    connection.settimeout(60)
    for _ in range(100):
        connection.sendall(wrong)
    connection.sendall(b"0\r\n\r\n")
    assert service.rss_bytes < before + 200 * MiB
    heard = b""
    while b'"done":true' not in heard:
        piece = connection.recv(65536)
        assert piece, heard[-500:]
        heard = (heard + piece)[-200_000:]
    connection.close()


def test_an_export_that_is_not_read_or_cut_leaves_nothing_behind(service):
    """An export waits for its reader in bounded memory, and ends when the reader goes."""
    text = "word " * 2000
    for start in range(0, 3000, 500):
        body = {"documents": [document(number, text=f"{number} {text}") for number in range(start, start + 500)]}
        service.ask("POST", f"{DOCS}?wait=acknowledged", body)
    service.ask("POST", "/collections/c/snapshot")
    before, handles = service.rss_bytes, service.open_files
    readers = []
    for _ in range(8):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", service.port))
        reader.sendall(f"GET {DOCS} HTTP/1.1\r\nhost: t\r\naccept: application/x-ndjson\r\n\r\n".encode())
        readers.append(reader)
    time.sleep(1)
    assert service.rss_bytes < before + 150 * MiB
    assert service.search(1, min_seq=0)["coverage"]["ratio"] == 1.0
    for reader in readers:
        reader.close()
    until(lambda: service.open_files <= handles + 3)
    tasks_at_rest(service)


def pour(service: TroubledService, size: int, text: str) -> tuple[int, int, dict]:
    """Send *size* bytes of NDJSON as fast as it is taken; return documents, the growth of memory, the reply."""
    service.write(range(10))
    before = service.rss_bytes
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=600)
    sent = [0, 0]

    def body():
        while sent[0] < size:
            start = sent[1]
            piece = b"".join(
                orjson.dumps(document(number, text=f"word{number}x0 {text}")) + b"\n"
                for number in range(start, start + 50)
            )
            sent[0] += len(piece)
            sent[1] += 50
            yield piece

    most = [before]
    over = threading.Event()

    def watch():
        while not over.wait(0.05):
            most[0] = max(most[0], service.rss_bytes)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        headers = {"content-type": "application/x-ndjson"}
        connection.request("POST", f"{DOCS}?wait=acknowledged", body(), headers, encode_chunked=True)
        reply = connection.getresponse()
        answer = orjson.loads(reply.read())
        assert reply.status == 200, answer
    finally:
        over.set()
        watching.join()
        connection.close()
    assert (answer["accepted"], answer["failed"]) == (sent[1], 0)
    return sent[1], most[0] - before, answer


def test_a_fast_stream_is_slowed_and_does_not_fill_memory(service):
    """30 MB as fast as they are taken: memory grows by a bound, searches go on, and all of it is found."""
    over = threading.Event()
    failures = []

    def ask():
        while not over.wait(0.05):
            try:
                service.search(5)
            except Exception as error:
                failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        documents, grown, _ = pour(service, 30 * MiB, "some words of a long text " * 300)
    finally:
        over.set()
        asking.join()
    print(f"{documents} documents, memory grew by {grown / MiB:.0f} MiB")
    assert not failures, failures[:3]
    assert grown < 400 * MiB
    seq = service.ask("GET", "/collections/c")["seq"]
    answer = service.search(documents - 1, min_seq=seq, timeout_ms=120_000)
    assert answer["hits"][0]["id"] == f"d{documents - 1}"


@SLOW
def test_200_mb_as_fast_as_they_are_taken(service):
    """The same with 200 MB of short and of long documents."""
    for text in ("some words of a long text " * 300, "a short one"):
        documents, grown, _ = pour(service, 200 * MiB if len(text) > 100 else 60 * MiB, text)
        print(f"{documents} documents, memory grew by {grown / MiB:.0f} MiB")
        assert grown < 400 * MiB
