"""Many searches at once: what they share, and how each is answered or refused by itself."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, Malformed, NotFound
from services.common.wire.search import SearchRequest
from services.search.answer import Answer
from services.search.batches import AT_ONCE, TOGETHER, Asked, Batches, Caller, Outcome
from services.search.ports import Embedded, EmbeddingModel
from tests.search_ports import Stack, make_stack


class Many:
    """Batches over a stack of ports."""

    def __init__(self) -> None:
        self.stack: Stack = make_stack()
        self.embedding = self.stack.embedding
        self.batches = Batches(self.stack.catalog, self.embedding, self.stack.pipeline)

    async def each(self, *asked: Asked | dict[str, Any], **caller: Any) -> list[Outcome]:
        return await self.batches.each([search(one) for one in asked], make_caller(**caller))

    @property
    def vectors(self) -> list[list[float] | None]:
        """The vector of each question that came to the shards."""
        return [None if query.vector is None else query.vector.tolist() for query in self.stack.retriever.queries]


def search(asked: Asked | dict[str, Any]) -> Asked:
    return SearchRequest(**{"collection": "books", **asked}) if isinstance(asked, dict) else asked


def make_caller(**fields: Any) -> Caller:
    given = {"due": lambda _: Deadline.after(30), "request_id": "r-1", "priority": "low"}
    return Caller(**{**given, **fields})


def said(outcomes: Sequence[Outcome]) -> list[str]:
    """Return each outcome as a word: that it is an answer, or the kind of error."""
    return ["answer" if isinstance(one, Answer) else type(one).__name__ for one in outcomes]


@pytest.fixture
def many() -> Many:
    return Many()


async def test_each_is_answered_or_refused_by_itself(many: Many):
    """One that fails leaves the others alone; an error among those asked stays what it is; the order is theirs."""
    broken = Malformed("no JSON")
    outcomes = await many.each(
        {"query": "one"},
        {"query": "two", "collection": "none"},
        broken,
        {"query": "three", "filter": {"a": {"$no": 1}}},
    )
    assert said(outcomes) == ["answer", NotFound.__name__, Malformed.__name__, InvalidInput.__name__]
    assert outcomes[2] is broken


async def test_questions_are_embedded_in_one_call(many: Many):
    """Each question gets its own vector of that call, and the embedding service is asked nothing more."""
    await many.each({"query": "a"}, {"query": "bb"}, {"query": "a", "k": 3}, {"query": "ccc"})
    assert many.embedding.together == [["a", "bb", "ccc"]]
    assert many.embedding.asked == []
    assert sorted(many.vectors) == [[1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]


async def test_what_needs_no_vector_is_not_embedded(many: Many):
    """Lexical searches, those that bring a vector, and those of collections without a model; and one alone is no batch."""
    await many.each(
        {"query": "a", "mode": "lexical"},
        {"query": "b", "query_vector": [1.0, 0.0]},
        {"query": "c", "collection": "own", "query_vector": [1.0, 0.0]},
        {"query": "d"},
    )
    assert many.embedding.together == []
    assert [text for text, _ in many.embedding.asked] == ["d"]


async def test_equal_searches_are_made_once(many: Many):
    """The same search again is the same answer; one that differs in anything is another."""
    outcomes = await many.each({"query": "a", "cache": False}, {"query": "a", "cache": False}, {"query": "a", "k": 2})
    assert outcomes[0] is outcomes[1]
    assert outcomes[0] is not outcomes[2]
    assert len(many.stack.retriever.queries) == 2


@pytest.mark.parametrize("error", [DependencyUnavailable("down"), DeadlineExceeded("late"), NotFound("no model")])
async def test_without_the_shared_call_each_asks_for_itself(
    many: Many, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    """What the one call could not give is not held against the searches."""

    async def refuse(*_: Any, **__: Any) -> Embedded:
        raise error

    monkeypatch.setattr(many.embedding, "embed_queries", refuse)
    outcomes = await many.each({"query": "a"}, {"query": "bb"})
    assert said(outcomes) == ["answer", "answer"]
    assert sorted(text for text, _ in many.embedding.asked) == ["a", "bb"]


async def test_vectors_of_another_model_are_not_used(many: Many):
    """They are compared with the collection's fingerprint, and each search is refused as it would be alone."""
    many.embedding.model_is = EmbeddingModel("other", "other@1", 2)
    assert said(await many.each({"query": "a"}, {"query": "bb"})) == ["Conflict", "Conflict"]
    assert many.vectors == []


async def test_eight_at_a_time_and_each_with_its_own_time(many: Many, monkeypatch: pytest.MonkeyPatch):
    """A search's time begins when its turn comes."""
    under_way = most = 0
    begun: list[str | None] = []

    async def answer(request: SearchRequest, deadline: Deadline, **_: Any) -> Answer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        assert begun[-1] == request.query
        await asyncio.sleep(0)
        under_way -= 1
        raise NotFound("nothing")

    def due(request: SearchRequest) -> Deadline:
        begun.append(request.query)
        return Deadline.after(1)

    monkeypatch.setattr(many.stack.pipeline, "answer", answer)
    asked = [{"query": f"q{n}", "mode": "lexical"} for n in range(20)]
    assert said(await many.each(*asked, due=due)) == ["NotFound"] * 20
    assert most == AT_ONCE
    assert begun == [f"q{n}" for n in range(20)]


async def test_a_fault_of_ours_is_one_searchs_error(many: Many, monkeypatch: pytest.MonkeyPatch):
    """An exception that nobody foresaw is logged, and is the outcome of that search alone."""
    answer = many.stack.pipeline.answer

    async def sometimes(request: SearchRequest, *arguments: Any, **named: Any) -> Answer:
        if request.query == "bad":
            raise RuntimeError("a fault")
        return await answer(request, *arguments, **named)

    monkeypatch.setattr(many.stack.pipeline, "answer", sometimes)
    with capture_logs() as logs:
        outcomes = await many.each({"query": "bad"}, {"query": "good"})
    assert said(outcomes) == ["RuntimeError", "answer"]
    assert "search_of_batch_failed" in [line["event"] for line in logs]


async def test_cancelling_cancels_all(many: Many, monkeypatch: pytest.MonkeyPatch):
    """A caller that goes leaves nothing running."""
    ended: list[str | None] = []

    async def answer(request: SearchRequest, *_: Any, **__: Any) -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.query)
        raise AssertionError

    monkeypatch.setattr(many.stack.pipeline, "answer", answer)
    running = asyncio.create_task(many.each({"query": "a", "mode": "lexical"}, {"query": "b", "mode": "lexical"}))
    for _ in range(5):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == ["a", "b"]


async def test_a_stream_is_taken_as_it_is_read(many: Many):
    """64 searches are in memory at a time, however many there are; outcomes come in their order."""
    taken = 0

    def asked():
        nonlocal taken
        for number in range(3 * TOGETHER):
            taken += 1
            yield search({"query": f"q{number}", "mode": "lexical", "collection": "books" if number % 2 else "none"})

    found: list[str] = []
    async for outcome in many.batches.stream(asked(), make_caller()):
        found += said([outcome])
        assert taken <= (len(found) - 1) // TOGETHER * TOGETHER + TOGETHER
    assert found == ["NotFound", "answer"] * (3 * TOGETHER // 2)
