"""`python -m services.embedding` as a process: models on the command line, and what stops the start."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

PATIENCE_S = 60.0


def start(directory: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the service on a port of its own choice, which it writes into *directory*/port."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("EMBEDDING_", "REDIS_"))}
    environ |= {"EMBEDDING_LISTEN_PORT": "0", "EMBEDDING_PORT_FILE": str(directory / "port"), **variables}
    command = [sys.executable, "-m", "services.embedding", *arguments]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_models_are_named_on_the_command_line(tmp_path):
    """--model goes before EMBEDDING_MODEL, as often as there are models; the first is the default; SIGTERM is a clean end."""
    process = start(tmp_path, "--model", "one=fake", "--model", "two=fake", EMBEDDING_MODEL="absent")
    try:
        give_up_at = time.monotonic() + PATIENCE_S
        while not (tmp_path / "port").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        with httpx2.Client(base_url=f"http://127.0.0.1:{(tmp_path / 'port').read_text()}", timeout=30) as client:
            cards = client.get("/models").json()["data"]
            assert [(card["id"], card["default"]) for card in cards] == [("one", True), ("two", False)]
            assert client.post("/embed", json={"inputs": "red", "model": "two"}).json()["model"] == "two"
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
    process = start(tmp_path, "--model", str(model))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, None)
    assert "Cannot start" in output
    assert str(model) in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_specification_that_cannot_be_read_stops_the_start(tmp_path):
    """It is a settings error, with what may stand there."""
    process = start(tmp_path, "--model", "fake;precision=fp8")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "EMBEDDING_MODEL" in output
    assert "fp16" in output
