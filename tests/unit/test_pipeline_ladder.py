"""Every row of the ladder: the part fails, the step is taken under exactly its flag, and whoever forbids it is told so."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

from services.common.admission import Admitted
from services.common.errors import DeadlineExceeded, DependencyUnavailable, NotReady, Overloaded, TercetError
from services.common.wire.search import Degradation, Require, Requirement
from services.search.ladder import LADDER, STEPS
from tests.conventions import ladder_doc
from tests.search_ports import SEQ, BrokenCache, Stack, ids, make_stack

DOWN, LATE = DependencyUnavailable("down"), DeadlineExceeded("late")


class FullHouse:
    """An admission under the greatest pressure that still lets everybody in."""

    in_flight, limit = 3.0, 4.0

    def enter(self, cost: float, priority: str, deadline: object, *, first: float) -> "FullHouse":
        return self

    async def __aenter__(self) -> Admitted:
        return Admitted(0.25, 1.0)

    async def __aexit__(self, *raised: object) -> None:
        pass


def embedding(error: TercetError) -> Callable[[], Stack]:
    def made() -> Stack:
        stack = make_stack()
        stack.embedding.error = error
        return stack

    return made


def reranking(error: TercetError | None = None, **scores: float | None) -> Callable[[], Stack]:
    def made() -> Stack:
        stack = make_stack()
        stack.reranker.error = error
        stack.reranker.scores |= scores
        return stack

    return made


def retrieving(**fields: object) -> Callable[[], Stack]:
    def made() -> Stack:
        stack = make_stack()
        stack.retriever.answer = replace(stack.retriever.answer, **fields)
        return stack

    return made


def crowded() -> Stack:
    stack = make_stack(admission=FullHouse())
    stack.retriever.candidates = [
        replace(stack.retriever.candidates[0], id=f"{n}{id_}") for n in "01" for id_ in "abcd"
    ]
    return stack


FAULTS: dict[Degradation, Callable[[], Stack]] = {
    "embedding_unavailable": embedding(DOWN),
    "embedding_late": embedding(LATE),
    "lexical_unavailable": retrieving(lexical_failed=1),
    "fallback_index": retrieving(fallback=1),
    "shards_partial": retrieving(ok=1, failures={1: "down"}),
    "catching_up": retrieving(catching_up=1),
    "rerank_unavailable": reranking(DOWN),
    "rerank_late": reranking(LATE),
    "rerank_partial": reranking(c=None),
    "rerank_reduced": crowded,
    "cache_unavailable": lambda: make_stack(cache=BrokenCache()),
}
ROWS = [step for step in LADDER if step.reason != "stale"]


def test_every_step_has_a_row():
    """The ladder names each reason once, and every requirement forbids some step."""
    assert [step.reason for step in LADDER] == list(STEPS)
    assert set(STEPS) == set(get_args(Degradation)) == {*FAULTS, "stale"}
    assert {step.requirement for step in LADDER} == set(get_args(Requirement)) == set(Require.model_fields) - {"full"}


def test_the_ladder_in_the_documentation_is_that_of_the_code():
    """docs/resilience.md has the table; `make docs` writes it."""
    page = ladder_doc.PAGE.read_text()
    assert ladder_doc.written(page) == page


@pytest.mark.parametrize("step", ROWS, ids=lambda step: step.reason)
async def test_a_step_is_taken_under_its_flag(step):
    """The search is answered, with that flag and no other."""
    reply = await FAULTS[step.reason]().search()
    assert reply.degraded == [step.reason]
    assert reply.hits


@pytest.mark.parametrize("step", ROWS, ids=lambda step: step.reason)
async def test_a_step_can_be_forbidden(step):
    """Who requires what the step gives up gets an error that names the requirement, even where an older answer is kept."""
    stack = FAULTS[step.reason]()
    with pytest.raises(DeadlineExceeded if step.late else DependencyUnavailable) as caught:
        await stack.search(require={step.requirement: True}, cache=step.reason == "cache_unavailable")
    assert caught.value.param == f"require.{step.requirement}"
    assert caught.value.retry_after_s is not None


@pytest.mark.parametrize("step", ROWS, ids=lambda step: step.reason)
async def test_full_forbids_all_but_the_loss_of_the_cache(step):
    """An answer made without the cache is as good as any."""
    stack = FAULTS[step.reason]()
    if step.reason == "cache_unavailable":
        assert (await stack.search(require={"full": True})).degraded == ["cache_unavailable"]
        return
    with pytest.raises((DeadlineExceeded, DependencyUnavailable)) as caught:
        await stack.search(require={"full": True})
    assert caught.value.param == "require.full"


@pytest.mark.parametrize("step", ROWS, ids=lambda step: step.reason)
async def test_what_is_well_forbids_nothing(step):
    """A requirement that is met changes nothing."""
    reply = await make_stack().search(require={step.requirement: True, "full": True})
    assert (ids(reply), reply.degraded) == (["d", "c", "b", "a"], [])


# --- the last step


async def nothing_answers(stack: Stack, error: Exception) -> None:
    """Keep an answer, let the collection move on, and let every search of the shards raise *error*."""
    await stack.search()
    stack.ledger.seq += 1

    async def fail(*_asked: object) -> None:
        raise error

    stack.retriever.retrieve = fail


@pytest.mark.parametrize("error", [DOWN, LATE, NotReady("closed"), Overloaded("full")], ids=lambda one: one.code)
async def test_when_nothing_answers_the_last_good_answer_does(error):
    """It is flagged, says how old it is and what it is true for, and has the caller's own request id."""
    stack = make_stack()
    await nothing_answers(stack, error)
    reply = await stack.search()
    assert (ids(reply), reply.degraded) == (["d", "c", "b", "a"], ["stale"])
    assert (reply.cache.hit, reply.cache.stale, reply.as_of, reply.request_id) == (True, True, SEQ, "r-1")
    assert reply.cache.age_ms >= 0
    assert reply.timings_ms["total"] > 0


async def test_other_steps_on_the_way_are_not_in_an_older_answer():
    """The older answer was whole: that embedding is down now says nothing about it."""
    stack = make_stack()
    await nothing_answers(stack, DOWN)
    stack.embedding.error = DOWN
    assert (await stack.search()).degraded == ["stale"]


@pytest.mark.parametrize("require", [{"fresh": True}, {"full": True}], ids=str)
async def test_an_older_answer_can_be_forbidden(require):
    """Then the error is the one that there would be without it."""
    stack = make_stack()
    await nothing_answers(stack, Overloaded("full"))
    with pytest.raises(Overloaded):
        await stack.search(require=require)


async def test_without_an_older_answer_there_is_an_error():
    """A question that was never asked has none."""
    stack = make_stack()
    await nothing_answers(stack, DOWN)
    with pytest.raises(DependencyUnavailable):
        await stack.search("something else")


async def test_a_forbidden_step_is_no_reason_for_an_older_answer():
    """A search whose own requirement fails it fails, whatever is kept."""
    stack = make_stack()
    await stack.search()
    stack.ledger.seq += 1
    stack.reranker.error = DOWN
    with pytest.raises(DependencyUnavailable) as caught:
        await stack.search(require={"rerank": True})
    assert caught.value.param == "require.rerank"


async def test_the_callers_mistakes_are_not_answered_from_the_cache():
    """What is wrong with a question is said, and not hidden by an older answer."""
    stack = make_stack()
    await stack.search()
    stack.ledger.seq += 1
    stack.embedding.model_is = replace(stack.embedding.model_is, fingerprint="m@2")
    with pytest.raises(TercetError) as caught:
        await stack.search()
    assert caught.value.code == "conflict"
