"""The cascade: the first scorer orders, the second takes the best as time allows, one score."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.batching import DeviceTurn, Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.rerank.cascade import Blend, Cascade, FittedBlend, LastBeforeFirst
from services.rerank.logits import logit_of, sigmoid
from services.rerank.score_cache import ScoreCache
from services.rerank.scorer import Scorer, ScorerLimits
from services.rerank.scores import Scored, ScoreOptions
from tests.rerank_backends import TroubledScorer

LIMITS = ScorerLimits(2048, 4000, 1, 30, 1 << 20, 4, 8)
QUERY = "red green blue white"
MOST = 100
FITTED = FittedBlend((1.0, 10.0, -2.0), (3.0, -1.0))

Open = Callable[..., "asyncio.Future[Cascade]"]


class Opposite(TroubledScorer):
    """The fake scorer that likes what it does not find, on a scale of its own."""

    def score(self, batch):
        """See Backend."""
        return 5.0 - 10.0 * super().score(batch)

    def to_probability(self, raw: float) -> float:
        """See Backend."""
        return sigmoid(raw)


@pytest.fixture
def last() -> TroubledScorer:
    """The second scorer."""
    return Opposite(name="model/last", fingerprint="last@1", max_tokens=128)


@pytest.fixture
async def start(last) -> AsyncIterator[Open]:
    """Start a cascade of the fake scorer and *last*, closed at the end."""
    started: list[Scorer] = []

    async def start(
        blend: Blend | None = FITTED,
        limits: ScorerLimits = LIMITS,
        cache: ScoreCache | None = None,
        most: int = MOST,
    ) -> Cascade:
        turn = DeviceTurn()
        one = Scorer(TroubledScorer(), LIMITS, turn=turn, cache=cache)
        two = Scorer(last, limits, turn=turn, cache=cache)
        for scorer in (one, two):
            started.append(scorer)
            await scorer.start()
        last.batches.clear()
        return Cascade(one, two, blend or LastBeforeFirst(one, two), most=most)

    yield start  # type: ignore[misc]
    for scorer in started:
        assert isinstance(scorer.backend, TroubledScorer)
        scorer.backend.let_go.set()
        await scorer.aclose()


async def score(cascade: Cascade, texts: list[str], **options: object) -> Scored:
    """Score without haste."""
    return await cascade.score(QUERY, texts, ScoreOptions(**{"lane": Lane.QUERY, "deadline": NO_DEADLINE, **options}))


async def test_one_score_of_both(start):
    """a·first + b·last + c, whose sigmoid is the score; tokens are those that both read."""
    cascade = await start()
    made = await score(cascade, ["red green", "red"])
    assert [one.score for one in made.documents] == pytest.approx([0.5 - 2.0, 0.25 + 25.0 - 2.0])
    assert all(one.stage == "last" and one.complete for one in made.documents)
    assert [one.tokens for one in made.documents] == [12, 10]
    assert (made.tokens, made.cached_tokens) == (22, 0)
    assert made.ranking() == [1, 0]
    assert cascade.to_probability(0.0) == 0.5


async def test_the_second_takes_the_best_first(start, last):
    """In the first one's order, equal ones in the order given."""
    cascade = await start()
    texts = ["red", "red green blue", "black", "red green", "blue"]
    await score(cascade, texts)
    seen = [len(set(last.tokenize_query(QUERY).ids) & set(window.document.ids)) for window in last.scored]
    assert sorted(seen) == [0, 1, 1, 2, 3]
    assert last.tokenized[-1] == ["red green blue", "red green", "red", "blue", "black"]


async def test_only_the_best_hundred(start, last):
    """The others keep the first one's score, and say so."""
    cascade = await start()
    texts = [f"red {number}" if number % 2 else f"text {number}" for number in range(3 * MOST)]
    made = await score(cascade, texts)
    assert len(last.scored) == MOST
    stages = [one.stage for one in made.documents]
    assert stages.count("last") == MOST
    assert [index for index, stage in enumerate(stages) if stage == "last"] == list(range(1, 2 * MOST, 2))
    assert made.documents[0].score == pytest.approx(-1.0)


async def test_what_the_caller_knows_counts_in_the_choice(start, last):
    """With priors the second reads the best by both; without, or where all are alike, the best by the first alone."""
    cascade = await start(most=2)
    texts = ["red green blue", "red green", "red", "other"]
    for priors, read in (
        (None, {0, 1}),
        ([1.0] * 4, {0, 1}),
        ([0.0, 1.0, 9.0, 9.0], {0, 2}),
    ):
        made = await score(cascade, texts, priors=priors)
        assert {at for at, one in enumerate(made.documents) if one.stage == "last"} == read


async def test_when_time_is_up_the_first_ones_score_stands(start, last):
    """A document that the second did not reach has a score all the same, and says whose."""
    cascade = await start()
    texts = ["hang red green", *(f"red {number}" for number in range(300, 400))]
    made = await score(cascade, texts[1:], allow_partial=True, deadline=NO_DEADLINE)
    assert all(one.stage == "last" for one in made.documents)
    first = cascade._first.backend
    first.let_go.set()
    made = await score(cascade, texts, allow_partial=True, deadline=Deadline.after(0.3))
    assert None not in made.documents
    assert {one.stage for one in made.documents} >= {"first"}
    hanging = made.documents[0]
    assert (hanging.stage, hanging.score) == ("first", pytest.approx(3.0 * 0.5 - 1.0))


async def test_without_partial_answers_both_must_be_done(start, last):
    """A deadline that comes before the second is through is an error."""
    cascade = await start()
    cascade._first.backend.let_go.set()
    with pytest.raises(DeadlineExceeded):
        await score(cascade, ["hang red", "red"], deadline=Deadline.after(0.2))


async def test_a_full_queue_at_the_second(start, last):
    """Where a partial answer is taken it is done without; else it is refused."""
    cascade = await start(limits=ScorerLimits(2048, 1, 1, 30, 1 << 20, 4, 8))
    made = await score(cascade, ["red", "red green"], allow_partial=True)
    assert [one.stage for one in made.documents] == ["first", "first"]
    with pytest.raises(Overloaded):
        await score(cascade, ["red", "red green"])


async def test_without_constants_the_seconds_order_goes_before(start):
    """What it scored is ranked by it, in the upper half of 0 to 1; the rest after that by the first, in the lower half."""
    cascade = await start(blend=None)
    texts = [f"red {number}" for number in range(MOST)] + ["black", "white night"]
    made = await score(cascade, ["red green", *texts])
    scores = [cascade.to_probability(one.score) for one in made.documents]
    last = [one for one, document in zip(scores, made.documents, strict=True) if document.stage == "last"]
    first = [one for one, document in zip(scores, made.documents, strict=True) if document.stage == "first"]
    assert len(first) == 3
    assert max(first) <= 0.5 <= min(last)
    assert scores[0] < scores[1]


async def test_what_is_known_of_both(start):
    """Each scorer's score is kept by itself; a document counts as known if neither had work with it."""
    cascade = await start(cache=ScoreCache(1 << 20))
    made = await score(cascade, ["red", "red green"])
    again = await score(cascade, ["red green", "blue", "red"])
    assert [one.cached for one in again.documents] == [True, False, True]
    assert (again.cached_tokens, again.documents[0].score) == (made.tokens, made.documents[1].score)


async def test_it_says_what_it_is(start):
    """Its name is the second's, its fingerprint tells both and how they are blended."""
    fitted, plain = (await start()).info, (await start(blend=None)).info
    assert (fitted.name, fitted.kind) == ("model/last", "cascade")
    assert "fake-rerank@1" in fitted.fingerprint
    assert "last@1" in fitted.fingerprint
    assert fitted.fingerprint != plain.fingerprint
    assert fitted.max_tokens == 128


@given(st.floats(-25, 25))
def test_logit_is_the_inverse_of_sigmoid(value):
    """To many digits, for all scores that differ in print."""
    assert logit_of(sigmoid(value)) == pytest.approx(value, rel=1e-3, abs=1e-9)


def test_the_ends_of_the_scale():
    """Any number has a probability, and any probability a finite logit."""
    assert (sigmoid(1e6), sigmoid(-1e6)) == (1.0, 0.0)
    assert math.isfinite(logit_of(0.0))
    assert math.isfinite(logit_of(1.0))
