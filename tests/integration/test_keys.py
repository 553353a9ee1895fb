"""Keys and limits in whole services: who is let in, in each dialect's own shape, and how keys travel between services."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, create_service_app
from services.common.http_errors import JsonRoute
from services.common.metrics import Metrics
from services.common.settings import ModelServiceSettings, ServiceSettings
from services.common.wire.base import ReplyModel
from services.rerank.app import create_app as create_rerank
from services.rerank.settings import RerankSettings
from services.search.routes import scope_needed
from tests.e2e.stack import DOCUMENTS, running
from tests.integration.conftest import Serve

SLOW = 0.001  # So few a second that no test is long enough to see one come back.
DIALECTS = {"/v1": "openai", "/tei": "tei", "/api/v1": "plain"}
SHAPES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "": lambda body: set(body["error"]) == {"code", "message", "type", "param", "retryable", "request_id"},
    "/v1": lambda body: isinstance(body["error"]["code"], str) and isinstance(body["error"]["message"], str),
    "/tei": lambda body: set(body) == {"error", "error_type"},
    "/api/v1": lambda body: set(body) == {"error", "code", "message"},
}


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries *key*."""
    return {"authorization": f"Bearer {key}"}


def write_keys(path: Path, **keys: dict[str, Any]) -> Path:
    """Write a file of keys, each named as its own text is, and return its path."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **entry} for name, entry in keys.items()
    ]
    path.write_text(json.dumps(entries))
    return path


class Who(ReplyModel):
    """Who called."""

    caller: str


def make_router(prefix: str) -> APIRouter:
    """Return a route that says who calls, one that costs tokens, and one that health probes ask."""
    router = APIRouter(route_class=JsonRoute, prefix=prefix)

    @router.get("/who")
    async def who(request: Request) -> Who:
        return Who(caller=caller_of(request))

    @router.get("/work/{tokens}")
    async def work(request: Request, tokens: int) -> Who:
        charge_tokens(request, tokens)
        return Who(caller=caller_of(request))

    @router.get("/health")
    async def health(request: Request) -> Response:
        return Response()

    return router


class Nothing:
    """Resources of a service that has none."""

    def problems(self) -> list[str]:
        return []


@asynccontextmanager
async def build(_settings: ServiceSettings, _metrics: Metrics) -> AsyncIterator[Nothing]:
    """Build nothing."""
    yield Nothing()


@pytest.fixture
def start(serve: Serve):
    """Return a function from settings to a running service with the routes above in every dialect."""

    def start(**settings: Any):
        routers = [make_router(prefix) for prefix in SHAPES]
        app = create_service_app(
            "embedding", ModelServiceSettings(**settings), build, routers, description="", dialects=DIALECTS
        )
        return serve(app)

    return start


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Three keys."""
    return write_keys(
        tmp_path / "keys.json",
        embedder={"scopes": ["embed"]},
        reader={"scopes": ["search", "rerank"]},
        slow={"scopes": ["embed"], "requests_per_s": SLOW, "requests_burst": 2},
    )


@pytest.mark.parametrize("prefix", SHAPES)
async def test_no_entry_without_a_key(start, keys_file, prefix):
    """401 without a key or with a wrong one, 403 with one that may not: each as the dialect writes errors."""
    async with start(api_keys_file=keys_file) as client:
        for headers, status in (({}, 401), (bearer("wrong"), 401), (bearer("reader"), 403)):
            answer = await client.get(f"{prefix}/who", headers=headers)
            assert answer.status_code == status
            assert SHAPES[prefix](answer.json())
            assert answer.headers["x-request-id"]
            assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        answer = await client.get(f"{prefix}/who", headers=bearer("embedder"))
        assert answer.json() == {"caller": "embedder"}


@pytest.mark.parametrize("prefix", SHAPES)
async def test_too_many_requests(start, keys_file, prefix):
    """A key that used up its burst gets 429 with Retry-After in the dialect's shape; the others do not."""
    async with start(api_keys_file=keys_file) as client:
        answers = [await client.get(f"{prefix}/who", headers=bearer("slow")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert SHAPES[prefix](answers[-1].json())
        assert 900 < int(answers[-1].headers["retry-after"]) <= 1000
        assert (await client.get(f"{prefix}/who", headers=bearer("embedder"))).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert 'tercet_errors_total{code="rate_limited"} 1.0' in metrics


async def test_too_many_tokens(start):
    """Tokens are charged after the work; the request that makes the debt is answered, the next is not."""
    async with start(tokens_per_s=SLOW, tokens_burst=100) as client:
        statuses = [(await client.get("/work/70")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert (await client.get("/who")).status_code == 429


async def test_without_keys_the_address_is_the_caller(start):
    """Limits go by the peer's address then; without limits charging does nothing."""
    async with start(requests_per_s=SLOW, requests_burst=1) as client:
        assert (await client.get("/who")).json() == {"caller": "127.0.0.1"}
        assert (await client.get("/who")).status_code == 429
    async with start() as client:
        for _ in range(100):
            assert (await client.get("/work/1000000")).status_code == 200


async def test_health_is_open_to_all_and_never_limited(start):
    """Probes and scrapers have no key; the documentation is open too, and says that the routes need one."""
    async with start(api_key="k", requests_per_s=SLOW, requests_burst=1) as client:
        for _ in range(3):
            for path in ("/livez", "/readyz", "/metrics", "/tei/health", "/docs"):
                assert (await client.get(path)).status_code == 200, path
        document = (await client.get("/openapi.json")).json()
        assert document["security"] == [{"bearer": []}, {"apiKey": []}]
        for method, path in (("POST", "/tei/"), ("POST", "/metrics"), ("GET", "/livez/"), ("GET", "/nowhere")):
            assert (await client.request(method, path)).status_code == 401, path


async def test_without_keys_the_documentation_asks_for_none(start):
    """The scheme is only there where there is one."""
    async with start() as client:
        assert "security" not in (await client.get("/openapi.json")).json()


async def test_a_body_is_not_read_for_nothing(start):
    """A caller without a key hears it before the body is looked at, however long or broken that is."""
    async with start(api_key="k", max_body_bytes=1024) as client:
        assert (await client.post("/who", content=b"x" * 5000)).status_code == 401


async def test_pages_of_named_origins_may_call(start):
    """A browser's preflight needs no key; other origins are not let in."""
    async with start(api_key="k", cors_origins="https://app.example") as client:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await client.options("/who", headers={"origin": "https://app.example", **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert (await client.options("/who", headers={"origin": "https://evil.example", **asks})).status_code == 400
        answer = await client.get("/who", headers={"origin": "https://app.example", **bearer("k")})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.get("/who", headers={"origin": "https://app.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")


async def test_the_rerank_service_asks_for_its_scope_and_charges_its_tokens(serve, keys_file):
    """Scope `rerank` opens it; both of its routes cost tokens."""
    body = {"query": "red", "documents": ["red green", "blue"]}
    settings = RerankSettings(model="fake", api_keys_file=keys_file, tokens_per_s=SLOW, tokens_burst=1)
    async with serve(create_rerank(settings)) as client:
        assert (await client.post("/rerank", json=body, headers=bearer("embedder"))).status_code == 403
        for path, status in (("/rerank", 200), ("/v1/rerank", 429)):
            assert (await client.post(path, json=body, headers=bearer("reader"))).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/search", "search"),
        ("GET", "/search", "search"),
        ("GET", "/status", "search"),
        ("GET", "/collections", "search"),
        ("GET", "/collections/a/documents/b", "search"),
        ("POST", "/collections", "write"),
        ("POST", "/collections/a/documents", "write"),
        ("DELETE", "/collections/a/documents/b", "write"),
        ("DELETE", "/collections/a/documents/b/c", "write"),
        ("DELETE", "/collections/a", "admin"),
        ("DELETE", "/collections/a/", "admin"),
        ("DELETE", "/collections/documents", "admin"),
    ],
)
def test_what_search_routes_need(method, path, scope):
    """Reading, writing, and deleting a whole collection are three things."""
    assert scope_needed(method, path) == scope


@pytest.mark.slow
async def test_keys_through_the_whole_stack(tmp_path: Path):
    """Search is opened by its own keys and opens the others with its peer key; the page needs none."""
    search_keys = write_keys(
        tmp_path / "search.json",
        reader={"scopes": ["search"]},
        writer={"scopes": ["search", "write"]},
        chief={"scopes": ["admin"]},
    )
    model_keys = write_keys(tmp_path / "models.json", peer={"scopes": ["embed", "rerank"]})
    environ = {
        "EMBEDDING_MODEL": "fake",
        "RERANK_MODEL": "fake",
        "EMBEDDING_API_KEYS_FILE": str(model_keys),
        "RERANK_API_KEYS_FILE": str(model_keys),
        "SEARCH_API_KEYS_FILE": str(search_keys),
        "SEARCH_PEER_API_KEY": "peer",
    }
    async with (
        running(tmp_path / "stack", **environ) as (stack, _),
        httpx2.AsyncClient(base_url=stack.url, timeout=30, trust_env=False) as http,
    ):

        async def status(method: str, path: str, key: str | None = None, **options: Any) -> int:
            answer = await http.request(method, path, headers=bearer(key) if key else None, **options)
            return answer.status_code

        assert await status("GET", "/") == 200
        for service, path in (("search", "/status"), ("embedding", "/info"), ("rerank", "/info")):
            assert await status("GET", f"{stack.urls[service]}{path}") == 401
        written = {"json": {"documents": DOCUMENTS}}
        assert await status("POST", "/collections/facts/documents", "reader", **written) == 403
        assert await status("POST", "/collections/facts/documents", "writer", **written) == 200
        question = {"json": {"query": "flour water salt yeast dough", "collection": "facts"}}
        answer = (await http.post("/search", headers=bearer("reader"), **question)).json()
        assert (answer["hits"][0]["id"], answer["degraded"]) == ("bread", [])
        assert await status("DELETE", "/collections/facts", "writer") == 403
        assert await status("DELETE", "/collections/facts", "chief") == 204
