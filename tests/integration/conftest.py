"""Whole services in this process: their apps with the lifespan run, and a client that calls them without a socket."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import orjson
import pytest
from fastapi import FastAPI

Serve = Callable[[FastAPI], AbstractAsyncContextManager[httpx2.AsyncClient]]
Refused = Callable[..., Any]

MAX_TEXT_CHARS = 1_000_000
JSON = {"content-type": "application/json"}

# Bodies that are refused before any field is looked at.
UNREADABLE: list[tuple[str, bytes]] = [
    ("broken JSON", b'{"inputs": '),
    ("invalid UTF-8", b'{"inputs": "\xff\xfe"}'),
    ("UTF-16", '{"inputs": "a"}'.encode("utf-16")),
    ("lone surrogate, escaped", b'{"inputs": "\\ud800"}'),
    ("lone surrogate, encoded", b'{"inputs": "\xed\xa0\x80"}'),
    ("a list", b'["a"]'),
    ("a string", b'"a"'),
    ("null", b"null"),
    ("NaN", b'{"inputs": NaN}'),
    ("deep nesting", b"[" * 100_000),
    ("null bytes", b"\x00" * 100),
]


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """Run *app*'s lifespan and yield a client of it; a stray exception is the client's 500, as over a socket."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client,
    ):
        yield client


@pytest.fixture
def serve() -> Serve:
    """Return `serving`: an async context manager from an app to its client."""
    return serving


@pytest.fixture
def refused(client: httpx2.AsyncClient) -> Refused:
    """Post a body that must be refused; check the envelope; return the status and the error."""

    async def refused(path: str, body: Any) -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        response = await client.post(path, content=content, headers=JSON)
        assert 400 <= response.status_code < 500, response.text[:500]
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"code", "message", "type", "param", "retryable", "request_id"}
        assert error["request_id"] == response.headers["x-request-id"]
        assert error["message"]
        assert len(response.content) < 2000
        return response.status_code, error

    return refused
