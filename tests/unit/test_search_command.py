"""`tercet search`: the options as the service gets them, and how marks and explanations are printed."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from tercet.cli import app

REPLY: dict[str, Any] = {
    "collection": "c",
    "hits": [
        {
            "id": "a",
            "score": 0.5,
            "score_kind": "fused",
            "text": "all of the text",
            "highlights": [{"text": "the\nbest \x1b[31mpassage", "marks": [[4, 8], [14, 21]]}],
            "stages": {"fused": 0.5},
        }
    ],
    "coverage": {"ratio": 1.0, "shards": {"total": 1, "ok": 1}},
    "degraded": [],
    "pipeline": {"retrieval": "hybrid"},
    "cache": {"hit": False},
    "as_of": 1,
    "timings_ms": {"total": 20},
    "explain": {
        "shards": [{"shard": 0, "plan": {"vectors": "hnsw", "filter": {"estimated": 0.1}}}],
        "candidates": {"total": 9, "dense": 9, "bm25": 4, "reranked": 0, "below_min_score": 2},
        "fusion": {"method": "standardized", "dense": 0.65, "bm25": 0.175, "bm25_confidence": 0.5},
    },
}


class Service:
    """A service that answers every search with REPLY and keeps what it was asked."""

    def __init__(self) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                body = json.dumps(REPLY).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def service() -> Iterator[Service]:
    """A running service."""
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever)
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


def test_options_become_fields(service: Service):
    """Each option is a field of the search; those that are not given are left to the service."""
    given = ["--filter", '{"n": 1}', "--group-by", "n", "--diversity", "0.5", "--exact", "--highlight", "--explain"]
    for options in ([], given):
        result = CliRunner().invoke(app, ["search", "why", "--url", service.url, *options])
        assert result.exit_code == 0, result.output
    plain, asked = service.asked
    assert plain == {"query": "why", "k": 10, "mode": "hybrid", "rerank": True}
    assert asked == {
        **plain,
        "filter": {"n": 1},
        "group_by": "n",
        "diversity": 0.5,
        "exact": True,
        "include": ["text", "metadata", "highlights"],
        "explain": True,
    }


def test_passages_and_plans_are_printed(service: Service):
    """The best passage stands for the text, without control characters; then candidates, weights and plans."""
    printed = CliRunner().invoke(app, ["search", "why", "--url", service.url]).stdout
    assert "    the best  [31mpassage\n" in printed
    assert "\x1b" not in printed
    assert "all of the text" not in printed
    assert "candidates: total 9 · dense 9 · bm25 4 · reranked 0 · below_min_score 2" in printed
    assert "fusion: standardized, dense 0.65, bm25 0.175 (confidence 0.5)" in printed
    assert 'shard 0: {"vectors": "hnsw", "filter": {"estimated": 0.1}}' in printed
