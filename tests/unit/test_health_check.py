"""services.common.health_check, against real sockets."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from services.common.health_check import main, problem


class _Handler(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b'{"status":"it"}')

    def log_message(self, *_: object):
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HTTPServer]:
    """A server on a free port, which it has written into `port`."""
    with HTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {})) as server:
        (tmp_path / "port").write_text(str(server.server_port))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_ready_service_passes(server: HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """200 at /readyz is exit status 0, and nothing is printed."""
    assert main([str(tmp_path / "port")]) == 0
    assert capsys.readouterr().out == ""


def test_a_service_that_is_not_ready_fails(server: HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Any other answer is exit status 1, and the answer is printed for whoever looks at the container."""
    server.RequestHandlerClass.status = 503  # type: ignore[attr-defined]
    assert main([str(tmp_path / "port")]) == 1
    assert capsys.readouterr().out == '503 {"status":"it"}\n'


def test_a_service_that_has_not_bound_its_port_fails(tmp_path: Path):
    """Without the file, or with something else in it, there is no port to ask."""
    assert problem(tmp_path / "port")
    (tmp_path / "port").write_text("")
    assert problem(tmp_path / "port")


def test_a_port_that_nobody_answers_at_fails(tmp_path: Path):
    """A refused connection is a problem, and no exception."""
    with HTTPServer(("127.0.0.1", 0), _Handler) as free:
        port = free.server_port
    (tmp_path / "port").write_text(str(port))
    found = problem(tmp_path / "port")
    assert found is not None
    assert str(port) in found


def test_a_service_that_hangs_fails_in_time(tmp_path: Path):
    """A port that accepts and says nothing is given up after the time-out."""
    with HTTPServer(("127.0.0.1", 0), _Handler) as silent:
        (tmp_path / "port").write_text(str(silent.server_port))
        assert "timed out" in str(problem(tmp_path / "port", timeout_s=0.05))
