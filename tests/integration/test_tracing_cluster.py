"""One trace from the caller's HTTP request to the shard node, both model services and the ledger's SQL, of real processes."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.otlp_collector import ReceivedSpan, collecting
from tests.search_process import ServiceProcess

CALLER = "00f067aa0ba902b7"
ROUTER, NODE, EMBEDDING, RERANK = "router", "node", "tercet-embedding", "tercet-rerank"
pytestmark = pytest.mark.slow
SHARDS = 2
QUESTIONS = ("moon tides", "bread dough", "bees dance")

Tree = dict[tuple[str, ...], list[ReceivedSpan]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[dict[str, Tree]]:
    """What each of some requests to a router over a shard node did: its spans by their path from the root."""
    place = tmp_path_factory.mktemp("cluster")
    ledger = f"{postgres_url}?schema=s{uuid.uuid4().hex[:12]}"
    with collecting() as collector, ExitStack() as stack:

        def start(service: str, name: str, **environ: str) -> ServiceProcess:
            prefix = service.upper()
            environ |= {f"{prefix}_OTLP_ENDPOINT": collector.endpoint, f"{prefix}_OTLP_SERVICE_NAME": name}
            process = ServiceProcess(service, place / f"{name}.log", **environ)
            process.start()
            stack.callback(process.stop)
            return process

        shared = {"SEARCH_LEDGER_URL": ledger, "SEARCH_RECALL_SAMPLE_RATIO": "1"}
        embedding = start("embedding", EMBEDDING, EMBEDDING_MODEL="fake")
        rerank = start("rerank", RERANK, RERANK_MODEL="fake")
        node = start("search", NODE, **shared, SEARCH_ROLE="shard", SEARCH_DATA_DIR=str(place / "node"))
        router = start(
            "search",
            ROUTER,
            **shared,
            SEARCH_ROLE="router",
            SEARCH_SHARD_NODES=node.url,
            SEARCH_EMBEDDING_URL=embedding.url,
            SEARCH_RERANK_URL=rerank.url,
            SEARCH_DATA_DIR=str(place / "router"),
            SEARCH_DEFAULT_SHARDS=str(SHARDS),
        )
        asked: dict[str, str] = {}

        def ask(name: str, path: str, body: Any) -> Any:
            asked[name] = uuid.uuid4().hex
            return router.ask("POST", path, body, headers={"traceparent": f"00-{asked[name]}-{CALLER}-01"})

        documents = [{"id": str(n), "text": f"about {question}"} for n, question in enumerate(QUESTIONS)]
        ask("write", "/collections/facts/documents", {"documents": documents})
        search = {"collection": "facts", "query": QUESTIONS[0]}
        ask("search", "/search", search)
        assert ask("again", "/search", search)["cache"]["hit"]
        searches = [{**search, "query": question, "cache": False} for question in QUESTIONS]
        ask("batch", "/search/batch", {"searches": searches})
        stack.close()
        yield {name: tree([s for s in collector.spans if s.trace_id == trace]) for name, trace in asked.items()}


def tree(spans: list[ReceivedSpan]) -> Tree:
    """Return *spans* by the names on the way to each, with the service where it changes; all must hang from one root."""
    by_id = {span.span_id: span for span in spans}

    def way(span: ReceivedSpan) -> tuple[str, ...]:
        parent = by_id.get(span.parent_id)
        if parent is None:
            assert span.parent_id == CALLER, span
            return (f"{span.service}: {span.name}",)
        return (*way(parent), span.name if parent.service == span.service else f"{span.service}: {span.name}")

    found: Tree = {}
    for span in spans:
        found.setdefault(way(span), []).append(span)
    assert len({path[0] for path in found}) == 1
    return found


def ends(found: Tree, test: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """Return the paths whose last name passes *test*."""
    return sorted(path for path in found if test(path[-1]))


def test_a_search_is_one_trace_through_every_process(traces: dict[str, Tree]):
    """Embedding, the shard node (words, search, documents) and rerank are under the stages that asked them."""
    found = traces["search"]
    root = f"{ROUTER}: POST /search"
    assert (root, "search.embed", "POST /embed", f"{EMBEDDING}: POST /embed", "inference") in found
    assert (root, "search.rerank", "POST /rerank", f"{RERANK}: POST /rerank", "inference") in found
    served = ends(found, lambda name: name.startswith(f"{NODE}: "))
    assert {path[1] for path in served} >= {"search.retrieve", "search.fetch"}
    assert all(path[0] == root for path in served)
    assert not any(span.failed for spans in found.values() for span in spans)


def test_a_kept_answer_is_checked_in_sql(traces: dict[str, Tree]):
    """The second time the trace goes from HTTP to the ledger's database, which says whether the collection moved."""
    found = traces["again"]
    assert [path[:2] for path in ends(found, lambda name: name.startswith("ledger."))] == [
        (f"{ROUTER}: POST /search", "search.cache")
    ]
    assert not ends(found, lambda name: name in ("search.embed", "search.retrieve", "search.rerank"))


def test_a_write_is_one_trace_from_http_to_sql(traces: dict[str, Tree]):
    """The documents' embedding and the transaction that holds them are under the write."""
    found = traces["write"]
    root = ends(found, lambda name: name.startswith(f"{ROUTER}: "))[0][0]
    assert (root, "ledger.append") in found
    assert (root, "POST /embed", f"{EMBEDDING}: POST /embed", "inference") in found


def test_a_batch_asks_the_model_once(traces: dict[str, Tree]):
    """Three questions are one call to the embedding service; each search has its own stages under the one root."""
    found = traces["batch"]
    root = f"{ROUTER}: POST /search/batch"
    assert len(found[root, "search.embed_batch", "POST /embed", f"{EMBEDDING}: POST /embed"]) == 1
    assert len(found[root, "search.retrieve"]) == len(QUESTIONS)
    assert not ends(found, lambda name: name == "search.embed")


def test_measuring_recall_is_in_no_callers_trace(traces: dict[str, Tree]):
    """The exact search in the background belongs to nobody's request: each search asks each shard once."""
    for name, searches in (("search", 1), ("batch", len(QUESTIONS))):
        asked = ends(traces[name], lambda last: last.startswith(f"{NODE}: ") and last.endswith("/search"))
        assert sum(len(traces[name][path]) for path in asked) == SHARDS * searches
