"""Services in processes of their own, on real sockets, for the tests that run other people's clients."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest

from services.common.model_files import DEFAULT_MODEL, resolve_model

PATIENCE_S = 100.0  # The first start on a machine measures runtimes and precisions.
TEXTS = [
    "What is the capital of France?",
    "Naïve café, 東京, 🙂",
    "x",
    "def f(a: int) -> str: ...",
    "a tide gauge " * 200,
]


@contextmanager
def model_service(name: str, directory: Path, **settings: str) -> Iterator[str]:
    """Run `python -m services.NAME` with *settings*, less their prefix; yield its base URL once it is ready."""
    port_file, prefix = directory / "port", f"{name.upper()}_"
    environ = {key: value for key, value in os.environ.items() if not key.startswith(prefix)}
    environ.pop("REDIS_URL", None)
    environ |= {f"{prefix}LISTEN_PORT": "0", f"{prefix}PORT_FILE": str(port_file)}
    environ |= {f"{prefix}{setting.upper()}": value for setting, value in settings.items()}
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}"], env=environ, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        give_up_at = time.monotonic() + PATIENCE_S
        while not port_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, log.read_text()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)


embedding_service = partial(model_service, "embedding")


@pytest.fixture(scope="session")
def clients_stay_here() -> Iterator[None]:
    """Clients that look for a proxy or a collector of traces find none: all traffic stays on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "HAYSTACK_TELEMETRY_ENABLED"):
            patch.setenv(name, "false")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, clients_stay_here: None) -> Iterator[str]:
    """The base URL of an embedding service with the packaged model, and `fake` beside it."""
    with embedding_service(tmp_path_factory.mktemp("embedding"), model=f"{DEFAULT_MODEL},fake") as url:
        yield url


@pytest.fixture
def http(server: str) -> Iterator[httpx2.Client]:
    """A plain HTTP client of the service."""
    with httpx2.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def reference() -> np.ndarray:
    """TEXTS as sentence-transformers embeds them in this process, in fp32: one unit-length row each."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(resolve_model(DEFAULT_MODEL)), device="cpu", local_files_only=True)
    return np.asarray(model.encode(TEXTS, convert_to_numpy=True, normalize_embeddings=True))


def assert_same_vectors(vectors: object, expected: np.ndarray) -> None:
    """Every row of *vectors* is of unit length and has a cosine of at least 0.999 to its row of *expected*."""
    rows = np.asarray(vectors, dtype=np.float32)
    assert rows.shape == expected.shape
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=1e-4)
    assert (rows * expected).sum(axis=1).min() >= 0.999
