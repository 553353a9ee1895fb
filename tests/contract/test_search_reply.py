"""The search reply as its callers know it: every field is there, with the meaning that the documentation gives it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from services.common.deadline import Deadline
from services.common.wire import examples
from services.common.wire.search import SearchReply, SearchRequest
from services.search.app import create_app
from services.search.ports import ShardCall
from services.search.settings import SearchSettings
from tests.search_ports import Stack, make_stack

# A search reply's fields, by their paths; `[]` is each of a list.
DOCUMENTED = """
collection
hits[].id hits[].score hits[].score_kind hits[].text hits[].title hits[].metadata hits[].highlights hits[].vector
hits[].highlights[].text hits[].highlights[].marks
hits[].stages.dense hits[].stages.bm25 hits[].stages.fused hits[].stages.rerank
coverage.ratio coverage.failures[].shard coverage.failures[].reason
coverage.shards.total coverage.shards.ok coverage.shards.timed_out coverage.shards.failed
coverage.shards.breaker_open coverage.shards.catching_up coverage.shards.fallback
degraded pipeline.retrieval pipeline.rerank cache.hit cache.age_ms cache.stale as_of timings_ms facets request_id
explain.shards[].shard explain.shards[].plan explain.shards[].host explain.shards[].took_ms explain.shards[].attempts
explain.shards[].hedged explain.shards[].applied_seq
explain.candidates.total explain.candidates.dense explain.candidates.bm25 explain.candidates.reranked
explain.candidates.below_min_score
explain.fusion.method explain.fusion.dense explain.fusion.bm25 explain.fusion.bm25_confidence
explain.cache.decision explain.cache.as_of explain.cache.age_ms explain.cache.watermark
explain.budget.timeout_ms explain.budget.stages_ms explain.budget.rerank_candidates
explain.admission.in_flight explain.admission.limit explain.admission.waited_ms explain.admission.pressure
explain.breakers
"""
FIELDS = DOCUMENTED.split()


def at(value: Any, path: str) -> list[Any]:
    """Return what is at *path* of a reply as JSON, for each element of its lists."""
    found = [value]
    for name in path.split("."):
        found = [one[name.removesuffix("[]")] for one in found if name.removesuffix("[]") in one]
        if name.endswith("[]"):
            found = [one for many in found for one in many]
    return found


def paths(schema: dict[str, Any], part: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the path of every field that *part* of *schema* documents."""
    for choice in (part, *part.get("anyOf", ())):
        if "$ref" in choice:
            model = schema["$defs"][choice["$ref"].rsplit("/", 1)[1]]
            yield from paths(schema, model, prefix)
        elif choice.get("type") == "array":
            yield from paths(schema, choice.get("items", {}), f"{prefix}[]")
        for name, field in choice.get("properties", {}).items():
            path = f"{prefix}.{name}" if prefix else name
            inner = list(paths(schema, field, path))
            yield from inner
            if not inner or any(one.startswith(f"{path}[]") for one in inner):
                yield path


@pytest.fixture
def openapi() -> dict[str, Any]:
    """The search service's documentation."""
    return create_app(SearchSettings()).openapi()


async def answer(stack: Stack, **fields: Any) -> dict[str, Any]:
    """Return a search's reply as the JSON that travels."""
    request = SearchRequest(query="why", collection="books", **fields)
    answer = await stack.pipeline.answer(request, Deadline.after(30.0), request_id="r-1")
    found: dict[str, Any] = orjson.loads(answer.body())
    return found


def test_the_fields_are_those_of_the_contract():
    """None has gone, and one that is new is added to this list on purpose."""
    schema = SearchReply.model_json_schema()
    lists = {"hits", "coverage.failures", "explain.shards"}  # Lists of objects are known by what is in them.
    assert set(paths(schema, schema)) - lists == set(FIELDS)


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_in_the_example(path):
    """The documented reply shows each field at least once."""
    assert at(examples.SEARCH_REPLY, path)


def test_the_examples_are_valid():
    """They are what the shapes say, with no field that is none."""
    assert SearchReply.model_validate(examples.SEARCH_REPLY).model_dump(mode="json") == examples.SEARCH_REPLY
    assert SearchRequest.model_validate(examples.SEARCH_REQUEST).query == examples.SEARCH_REQUEST["query"]


def test_the_documentation_has_the_examples(openapi):
    """OpenAPI shows them, and says what every model of a reply is."""
    schemas = openapi["components"]["schemas"]
    assert schemas["SearchReply"]["examples"] == [examples.SEARCH_REPLY]
    assert schemas["SearchRequest"]["examples"] == [examples.SEARCH_REQUEST]
    reply = openapi["paths"]["/search"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert reply["$ref"].endswith("/SearchReply")
    assert schemas["SearchReply"].keys() >= {"description", "properties"}
    for name, field in schemas["SearchReply"]["properties"].items():
        parts = [field, *field.get("anyOf", ())]
        models = [schemas[part["$ref"].rsplit("/", 1)[1]] for part in parts if "$ref" in part]
        assert any("description" in part for part in [*parts, *models]), name


async def test_a_whole_answer_has_the_fields_that_always_are():
    """What is asked for beside is not there, and nothing is null."""
    found = await answer(make_stack())
    assert found.keys() == {
        *("collection", "hits", "coverage", "degraded", "pipeline", "cache", "as_of", "timings_ms", "request_id")
    }
    assert found["hits"][0].keys() == {"id", "score", "score_kind", "title", "text", "metadata", "stages"}
    assert found["coverage"]["shards"] == {
        **{"total": 2, "ok": 2, "fallback": 0, "timed_out": 0, "failed": 0, "breaker_open": 0, "catching_up": 0}
    }
    assert (found["degraded"], found["coverage"]["failures"], found["cache"]) == (
        [],
        [],
        {"hit": False, "stale": False},
    )
    assert b"null" not in orjson.dumps(found)


async def test_everything_that_can_be_asked_for_comes():
    """With all options, a shard that failed, and an older answer in the cache, every field has a value."""
    stack = make_stack()
    await answer(stack, include=["text", "metadata", "highlights", "vector"], facets={"n": 3})
    stack.retriever.answer = replace(
        stack.retriever.answer,
        ok=1,
        failures={1: "down"},
        breaker_open=1,
        terms=("text",),
        plans={0: {"vectors": "flat"}},
        calls={0: ShardCall("local", 1.23456, 9, 2, hedged=True)},
    )
    found = await answer(stack, include=["text", "metadata", "highlights", "vector"], facets={"n": 3}, explain=True)
    for path in set(FIELDS) - {"cache.age_ms"}:
        assert at(found, path), path
    assert found["explain"]["shards"] == [
        {
            "shard": 0,
            "plan": {"vectors": "flat"},
            "host": "local",
            "took_ms": 1.235,
            "applied_seq": 9,
            "attempts": 2,
            "hedged": True,
        }
    ]
    assert (found["coverage"]["shards"]["breaker_open"], found["degraded"]) == (1, ["shards_partial"])


async def test_a_kept_answer_says_how_old_it_is():
    """It is the same answer, but for what is its caller's own."""
    stack = make_stack()
    made, kept = await answer(stack), await answer(stack)
    own = {"cache", "timings_ms"}
    assert {name: value for name, value in made.items() if name not in own} == {
        name: value for name, value in kept.items() if name not in own
    }
    assert kept["cache"].keys() == {"hit", "stale", "age_ms"}
    assert (kept["cache"]["hit"], kept["cache"]["stale"]) == (True, False)
