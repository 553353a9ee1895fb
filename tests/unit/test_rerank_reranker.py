"""The use case: probabilities or raw scores, classification, and what it is told and tells."""

import math
from collections.abc import AsyncIterator, Callable

import pytest

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import InvalidInput, NotFound
from services.rerank.cascade import Cascade, FittedBlend
from services.rerank.ports import Backend
from services.rerank.reranker import Reranker, Scored
from services.rerank.scorer import Scorer, ScorerLimits
from tests.rerank_backends import LabellingScorer, TroubledScorer

LIMITS = ScorerLimits(2048, 4000, 1, 30, 1 << 20, 4, 8)
QUERY = "red green blue white"

Open = Callable[..., Reranker]


class Heard:
    """What an observer was told."""

    def __init__(self) -> None:
        self.look_ups: list[tuple[int, int]] = []
        self.outcomes: list[tuple[int, int, int]] = []

    def looked_up(self, hits: int, misses: int) -> None:
        """See ScoringObserver."""
        self.look_ups.append((hits, misses))

    def scored(self, last: int, first: int, unscored: int) -> None:
        """See ScoringObserver."""
        self.outcomes.append((last, first, unscored))


@pytest.fixture
async def start() -> AsyncIterator[Open]:
    """Start rerankers, closed at the end."""
    started: list[Reranker] = []

    async def start(*backends: Backend, **options: object) -> Reranker:
        scorers = [Scorer(backend, LIMITS) for backend in backends]
        cascade = Cascade(*scorers, FittedBlend((1.0, 1.0, -1.0), (1.0, -2.0))) if len(scorers) > 1 else None
        started.append(Reranker(scorers, cascade, **options))  # type: ignore[arg-type]
        await started[-1].start()
        return started[-1]

    yield start  # type: ignore[misc]
    for reranker in started:
        await reranker.aclose()


async def score(reranker: Reranker, texts: list[str], **options: object) -> Scored:
    """Score without haste."""
    return await reranker.score(QUERY, texts, **{"lane": Lane.QUERY, "deadline": NO_DEADLINE, **options})


async def test_one_scorer(start):
    """Its probabilities in the order given; equal documents count each; the ranking is by falling score."""
    reranker = await start(TroubledScorer())
    made = await score(reranker, ["red", "red green blue", "black", "red"])
    assert [one.score for one in made.documents] == [0.25, 0.75, 0.0, 0.25]
    assert made.ranking() == [1, 0, 3, 2]
    assert made.tokens == 5 + 7 + 5 + 5
    assert {one.stage for one in made.documents} == {"last"}
    assert min(made.tokenization_ms, made.queue_ms, made.inference_ms) >= 0.0


async def test_nothing_to_score(start):
    """No documents are no work."""
    made = await score(await start(TroubledScorer(), TroubledScorer()), [])
    assert (made.documents, made.ranking(), made.tokens) == ([], [], 0)


async def test_raw_scores_of_a_cascade_are_logits(start):
    """Of the blended score, which is their sigmoid."""
    reranker = await start(TroubledScorer(), TroubledScorer())
    finished = await score(reranker, ["red", "red green"])
    raw = await score(reranker, ["red", "red green"], raw=True)
    assert [one.score for one in raw.documents] == [-0.5, 0.0]
    assert [one.score for one in finished.documents] == pytest.approx([1 / (1 + math.exp(0.5)), 0.5])
    assert raw.ranking() == finished.ranking() == [1, 0]


async def test_unscored_documents_come_last(start):
    """In the order given, where the deadline came first."""
    reranker = await start(TroubledScorer())
    made = await score(reranker, ["red", "green"], deadline=Deadline.after(-1), allow_partial=True)
    assert (made.documents, made.ranking(), made.tokens) == ([None, None], [0, 1], 0)


async def test_long_documents_as_the_service_is_set(start):
    """A request's own wish goes before."""
    text = "word " * 300 + "red"
    reranker = await start(TroubledScorer(), long_documents="first")
    assert (await score(reranker, [text])).documents[0].score == 0.0
    assert (await score(reranker, [text], long_documents="windows")).documents[0].score == 0.25


async def test_a_long_query_is_told(start):
    """By either scorer of a cascade."""
    reranker = await start(TroubledScorer(), TroubledScorer(max_tokens=32))
    made = await reranker.score("word " * 20, ["red"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert made.query_cut
    assert not (await score(reranker, ["red"])).query_cut


async def test_the_model_by_its_names(start):
    """With and without what stands before the slash; any other name is told what there is."""
    reranker = await start(TroubledScorer(name="org/model"))
    for name in (None, "org/model", "model"):
        reranker.check_model(name)
    with pytest.raises(NotFound, match="org/model"):
        reranker.check_model("other")


async def test_an_observer_hears(start):
    """What was known, and who had the last word on how many documents."""
    heard = Heard()
    reranker = await start(TroubledScorer(), observer=heard)
    await score(reranker, ["red", "green"])
    await score(reranker, ["red", "green"], deadline=Deadline.after(-1), allow_partial=True)
    assert heard.outcomes == [(2, 0, 0), (0, 0, 2)]
    assert heard.look_ups == [(0, 2), (0, 0)]


# --- classification -------------------------------------------------------------------------------------------------


async def test_labels_best_first(start):
    """Probabilities that add up to 1, or the model's own outputs; a second text is read where there is one."""
    reranker = await start(LabellingScorer("red", "green", "blue"))
    made = await reranker.classify(
        [("green green blue", None), ("green", "red")], lane=Lane.QUERY, deadline=NO_DEADLINE
    )
    assert [label for label, _ in made.rows[0]] == ["green", "blue", "red"]
    assert [sum(score for _, score in row) for row in made.rows] == pytest.approx([1.0, 1.0])
    assert made.rows[1][0] == ("red", pytest.approx(math.e / (math.e + 2)))
    assert made.tokens == 3 + 2
    raw = await reranker.classify([("green green", None)], lane=Lane.QUERY, deadline=NO_DEADLINE, raw=True)
    assert raw.rows == [[("green", 2.0), ("red", 0.0), ("blue", 0.0)]]


async def test_a_classifier_does_not_rank(start):
    """Asked for relevance it says what it can do."""
    reranker = await start(LabellingScorer("red", "green", "blue"))
    with pytest.raises(InvalidInput, match="3 labels"):
        await score(reranker, ["red"])


async def test_a_ranker_does_not_classify(start):
    """Asked for labels it says what it can do."""
    reranker = await start(TroubledScorer())
    with pytest.raises(InvalidInput, match="one output"):
        await reranker.classify([("red", None)], lane=Lane.QUERY, deadline=NO_DEADLINE)


async def test_problems_name_the_scorer(start):
    """None while all is well; a worker that died is told with whose it is."""
    backend = TroubledScorer(name="org/model")
    reranker = await start(backend)
    assert reranker.problems() == []
    reranker._last.batcher._worker.failure = "it is dead"
    assert reranker.problems() == ["org/model: it is dead"]
