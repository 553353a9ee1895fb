"""A supervised service that says it cannot work any more is started anew."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from tercet import supervision
from tercet.supervision import Event, ServiceSpec, Supervised

# Answers 200 to everything, and from its third /livez on 503: its model hangs, say.
SERVER = """
import http.server, sys
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += self.path == "/livez"
        self.send_response(503 if self.path == "/livez" and asked > 2 else 200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_a_service_that_says_it_is_dead_is_restarted(monkeypatch, tmp_path: Path, free_port: int) -> None:
    """Two red answers on /livez in a row end the process; another is started, and ready."""
    monkeypatch.setattr(supervision, "_LIFE_POLL_S", 0.05)
    events: list[Event] = []
    command = (sys.executable, "-c", SERVER, str(free_port))
    spec = ServiceSpec("embedding", command, {}, f"http://127.0.0.1:{free_port}", tmp_path / "log")
    service = Supervised(spec, events.append, first_backoff_s=0.01)
    await service.start()
    first = service.pid
    try:
        async with asyncio.timeout(30):
            while [event.kind for event in events].count("ready") < 2:
                await asyncio.sleep(0.02)
        assert service.pid not in (None, first)
    finally:
        await service.stop(5.0)
    assert [event.kind for event in events[:4]] == ["starting", "ready", "exited", "starting"]
