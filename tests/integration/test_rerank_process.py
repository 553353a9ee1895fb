"""`python -m services.rerank` as a process: its start and end, what stops the start, and a scorer that kills it."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

PATIENCE_S = 60.0


def start(directory: Path, module: str = "services.rerank", **variables: str) -> subprocess.Popen[str]:
    """Start the service on a port of its own choice, which it writes into *directory*/port."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RERANK_", "REDIS_"))}
    environ |= {"RERANK_LISTEN_PORT": "0", "RERANK_PORT_FILE": str(directory / "port"), **variables}
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def address(process: subprocess.Popen[str], directory: Path) -> str:
    """Wait until the service listens; return where."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not (directory / "port").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    return f"http://127.0.0.1:{(directory / 'port').read_text()}"


@pytest.mark.slow
def test_a_cascade_from_the_environment(tmp_path):
    """Two scorers are named by variables; the process answers, and SIGTERM is a clean end."""
    process = start(tmp_path, RERANK_MODEL="fake", RERANK_FIRST_STAGE="fake")
    try:
        with httpx2.Client(base_url=address(process, tmp_path), timeout=30) as client:
            assert client.get("/info").json()["kind"] == "cascade"
            reply = client.post("/rerank", json={"query": "red green", "documents": ["red", "red green"]}).json()
            assert [result["index"] for result in reply["results"]] == [1, 0]
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_a_directory_without_its_weights_stops_the_start(tmp_path):
    """The process ends with one line that names what is missing, and no traceback."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    process = start(tmp_path, RERANK_MODEL=str(model))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, None)
    assert "Cannot start" in output
    assert str(model) in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_scorer_that_kills_its_process(tmp_path):
    """Everybody who waits is told by the end of the connection, at once; nobody waits for ever."""
    process = start(tmp_path, "tests.rerank_service")
    try:
        url = address(process, tmp_path)

        def ask(document: str) -> int | None:
            try:
                body = {"query": "red", "documents": [document]}
                return httpx2.post(f"{url}/rerank", json=body, timeout=PATIENCE_S).status_code
            except httpx2.TransportError:
                return None

        assert ask("red") == 200
        with ThreadPoolExecutor(4) as pool:
            hanging = pool.submit(ask, "hang")
            while "tercet_rerank_query_queue_items 1.0" not in httpx2.get(f"{url}/metrics").text:
                time.sleep(0.02)
            waiting = [pool.submit(ask, "red green") for _ in range(2)]
            process.kill()
            assert [one.result(PATIENCE_S) for one in (hanging, *waiting)] == [None] * 3
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    (tmp_path / "port").unlink()
    process = start(tmp_path, "tests.rerank_service")
    try:
        url = address(process, tmp_path)
        assert ask("die") is None
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
    finally:
        process.kill()
