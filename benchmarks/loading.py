"""Writing to the search service over HTTP: how fast, and what searches meanwhile are worth."""

import http.client
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import ormsgpack

from benchmarks.effort import Effort
from benchmarks.figures import number, percentile, spread
from benchmarks.report import Row
from benchmarks.servers import Running, ServerFailed, ServerSpec, running
from benchmarks.vectors import DIM, LIMIT, VectorSet, fields, texts

NDJSON, MSGPACK = "application/x-ndjson", "application/msgpack"

_COLLECTION = "bench"
_SLICE = 1000
_PIECE_BYTES = 256 * 1024
_PATIENCE_S = 900.0


def bulk_load(effort: Effort, vectors: VectorSet, rows: int, scratch: Path) -> Row:
    """Load *rows* documents with vectors and text over HTTP, in both formats, each round into an empty service."""
    rounds = min(2, effort.rounds)
    row = Row(
        "load",
        f"Bulk load of {rows:,} documents over HTTP: vector of {DIM} dimensions, 60 words, two fields",
        f"{rounds} rounds into an empty service; one connection, one stream, prepared beforehand; the clock stops when the "
        "reply says that all is synced in the ledger and found by searches (`wait=applied`), BM25 included; sealing is the "
        "time after that until the service is idle. To reach: ≥ 3,000 documents/s.",
        ("format", "documents/s", "then sealing s", "resident MB at the end"),
    )
    for title, content_type, encode in (("NDJSON", NDJSON, _as_ndjson), ("MessagePack", MSGPACK, _as_msgpack)):
        body = scratch / "body"
        _write_body(body, vectors, rows, encode)
        rates, seals, memory = [], [], []
        for attempt in range(rounds):
            with _service(scratch / f"load-{title}-{attempt}") as server:
                began = time.perf_counter()
                _send(server, body, content_type, rows)
                rates.append(rows / (time.perf_counter() - began))
                seals.append(server.wait_until_idle(_PATIENCE_S))
                memory.append(server.resident_mb())
        row.lines.append((title, str(spread(rates)), str(spread(seals)), str(spread(memory))))
        row.bars.setdefault("documents/s", {})[title] = spread(rates)
        body.unlink()
    return row


@dataclass(slots=True)
class _Searches:
    """What was asked while the loading went on: which question, how long it took, what it was true for, what it found."""

    questions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    as_of: list[int] = field(default_factory=list)
    found: list[list[int]] = field(default_factory=list)


def searches_while_loading(vectors: VectorSet, rows: int, scratch: Path) -> Row:
    """Search without a pause while *rows* documents are loaded at full speed."""
    row = Row(
        "loading",
        f"Searches while {rows:,} documents are loaded at full speed",
        "One client that searches by vector over HTTP, one question after the other, cache off, beside one MessagePack "
        "stream; recall@10 of a sample against exact search over what its reply's `as_of` says was applied. To reach: "
        "p99 ≤ 50 ms, recall ≥ .98.",
        ("searches", "p50 ms", "p99 ms", "recall@10", "documents/s meanwhile"),
    )
    body = scratch / "body"
    _write_body(body, vectors, rows, _as_msgpack)
    with _service(scratch / "loading") as server:
        searches, stop = _Searches(), threading.Event()
        thread = threading.Thread(target=_keep_searching, args=(server, vectors, searches, stop))
        thread.start()
        began = time.perf_counter()
        try:
            _send(server, body, MSGPACK, rows)
        finally:
            took_s = time.perf_counter() - began
            stop.set()
            thread.join()
    body.unlink()
    if not searches.seconds:
        raise ServerFailed("no search was answered while loading")
    ms = [second * 1e3 for second in searches.seconds]
    row.lines.append(
        (
            f"{len(ms):,}",
            number(percentile(ms, 50)),
            number(percentile(ms, 99)),
            f"{_recall_as_of(vectors, searches):.4f}",
            number(rows / took_s),
        )
    )
    return row


def _recall_as_of(vectors: VectorSet, searches: _Searches, sample: int = 60) -> float:
    wanted = right = 0
    for place in range(0, len(searches.found), max(1, len(searches.found) // sample)):
        as_of = searches.as_of[place]
        scores = vectors.vectors[:as_of] @ vectors.queries[searches.questions[place]]
        settled = [row for row in searches.found[place] if row < as_of]  # Newer ones may already be there.
        truth = set(scores.argsort()[::-1][: LIMIT - (len(searches.found[place]) - len(settled))].tolist())
        wanted += len(truth)
        right += len(truth.intersection(settled))
    return right / wanted if wanted else 1.0


def _keep_searching(server: Running, vectors: VectorSet, searches: _Searches, stop: threading.Event) -> None:
    queries = vectors.queries
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    while not stop.is_set():
        number_ = len(searches.seconds) % len(queries)
        question = {"query_vector": queries[number_].tolist(), "mode": "dense", "k": LIMIT, "rerank": False}
        content = orjson.dumps({**question, "collection": _COLLECTION, "cache": False, "include": []})
        began = time.perf_counter()
        connection.request("POST", "/search", content, {"content-type": "application/json"})
        reply = connection.getresponse()
        answer = orjson.loads(reply.read())
        if reply.status == 200 and answer["as_of"] > LIMIT:
            searches.seconds.append(time.perf_counter() - began)
            searches.questions.append(number_)
            searches.as_of.append(answer["as_of"])
            searches.found.append([int(hit["id"]) for hit in answer["hits"]])
    connection.close()


@contextmanager
def _service(directory: Path) -> Iterator[Running]:
    """Give a search service with an empty collection for own vectors, running."""
    directory.mkdir(parents=True)
    spec = ServerSpec(
        "tercet-search",
        command=lambda port: [sys.executable, "-m", "services.search"],
        environ=lambda port: {"SEARCH_LISTEN_PORT": str(port), "SEARCH_DATA_DIR": str(directory / "data")},
        ready_path="/readyz",
        path="/search",
        body=lambda texts, fields: b"",
    )
    with running([spec], directory) as servers:
        server = servers[spec.name]
        server.resume()
        post(server, "/collections", orjson.dumps({"name": _COLLECTION, "dim": DIM}), "application/json")
        yield server


def _send(server: Running, body: Path, content_type: str, rows: int) -> None:
    def pieces() -> Iterator[bytes]:
        with body.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    reply = post(server, f"/collections/{_COLLECTION}/documents?wait=applied", pieces(), content_type)
    if reply["accepted"] != rows or not reply["applied"]:
        raise ServerFailed(f"{rows} documents were sent, and the service says: {str(reply)[:500]}")


def post(server: Running, path: str, body: Any, content_type: str) -> dict[str, Any]:
    """POST *body*, bytes or pieces of them, and return the JSON. Raises ServerFailed for another status than success."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=_PATIENCE_S)
    try:
        connection.request(
            "POST", path, body, {"content-type": content_type}, encode_chunked=not isinstance(body, bytes)
        )
        reply = connection.getresponse()
        content = reply.read()
        if reply.status >= 300:
            raise ServerFailed(f"{path} answered {reply.status}: {content[:300]!r}")
        answer: dict[str, Any] = orjson.loads(content)
        return answer
    finally:
        connection.close()


def _write_body(path: Path, vectors: VectorSet, rows: int, encode: Callable[[dict[str, Any], Any], bytes]) -> None:
    with path.open("wb") as file:
        for start in range(0, rows, _SLICE):
            stop = min(start + _SLICE, rows)
            for row, text, vector in zip(
                range(start, stop), texts(start, stop - start), vectors.vectors[start:stop], strict=True
            ):
                file.write(encode({"id": str(row), "text": text, "metadata": fields(row)}, vector))


def _as_ndjson(document: dict[str, Any], vector: Any) -> bytes:
    return orjson.dumps({**document, "vector": vector.tolist()}) + b"\n"


def _as_msgpack(document: dict[str, Any], vector: Any) -> bytes:
    return ormsgpack.packb({**document, "vector": vector.tobytes()})
