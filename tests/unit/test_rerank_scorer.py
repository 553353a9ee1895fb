"""One scorer behind its batcher: windows, identical pairs, deadlines, fairness, and whose fault a failure is."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, DeadlineExceeded, NotReady, OutOfMemory, Overloaded
from services.rerank.score_cache import ScoreCache
from services.rerank.scorer import SORT_WINDOW, Scorer, ScorerLimits
from services.rerank.scores import RawScores, ScoreOptions
from services.rerank.tokenized import CHUNK_ITEMS
from tests.batching_engine import until
from tests.rerank_backends import PATIENCE_S, LabellingScorer, SharingScorer, TroubledScorer

LIMITS = ScorerLimits(
    max_batch_tokens=2048,
    max_queue_items=4000,
    tokenizer_threads=1,
    hang_s=30,
    tokenized_cache_bytes=1 << 20,
    window_overlap_tokens=4,
    max_windows=8,
)
OPTIONS = ScoreOptions(Lane.QUERY, NO_DEADLINE)

Open = Callable[..., "asyncio.Future[Scorer]"]


@pytest.fixture
async def start() -> AsyncIterator[Open]:
    """Start scorers, closed at the end; what they did to warm up is forgotten."""
    started: list[Scorer] = []

    async def start(backend: TroubledScorer, limits: ScorerLimits = LIMITS, **options: object) -> Scorer:
        scorer = Scorer(backend, limits, **options)  # type: ignore[arg-type]
        started.append(scorer)
        await scorer.start()
        if isinstance(backend, TroubledScorer):
            backend.batches.clear()
            backend.tokenized.clear()
        return scorer

    yield start  # type: ignore[misc]
    for scorer in started:
        if isinstance(scorer.backend, TroubledScorer):
            scorer.backend.let_go.set()
        await scorer.aclose()


async def raw(scorer: Scorer, query: str, texts: list[str], **options: object) -> RawScores:
    """Score without haste."""
    return await scorer.raw(query, texts, ScoreOptions(**{"lane": Lane.QUERY, "deadline": NO_DEADLINE, **options}))


def values(scores: RawScores) -> list[float | None]:
    """Return the raw scores."""
    return [one and one.raw for one in scores.documents]


async def hang(scorer: Scorer, backend: TroubledScorer) -> "asyncio.Task[RawScores]":
    """Have the worker busy until `let_go`."""
    task = asyncio.create_task(raw(scorer, "busy", ["hang"]))
    await asyncio.to_thread(backend.hangs.wait, PATIENCE_S)
    return task


# --- windows --------------------------------------------------------------------------------------------------------


async def test_scores_keep_the_order_given(start):
    """One score a document, whatever their lengths, empty ones too; tokens are those read of query and document."""
    scorer = await start(TroubledScorer())
    made = await raw(scorer, "red green blue white", ["red", "", "red green blue and more words", "black"])
    assert values(made) == [0.25, 0.0, 0.75, 0.0]
    assert [one.tokens for one in made.documents] == [5, 4, 10, 5]
    assert [one.best_passage for one in made.documents] == [(0, 3), (0, 0), (0, 29), (0, 5)]
    assert all(one.complete and not one.cached and one.passages == 1 for one in made.documents)
    assert not made.query_cut


async def test_the_best_part_of_a_long_document_counts(start):
    """It is read in parts that overlap; its score is that of the best, whose place in the text is told."""
    scorer = await start(TroubledScorer(max_tokens=32))
    text = "word " * 40 + "red green " + "more " * 40
    (one,) = (await raw(scorer, "red green", [text])).documents
    assert (one.raw, one.passages) == (1.0, 3)
    start_at, end_at = one.best_passage
    assert text[start_at:end_at].split() == ["word"] * 14 + ["red", "green"] + ["more"] * 14
    assert one.tokens == 82 + 2 * 4 + 3 * 2


async def test_only_the_first_part_if_so_asked(start):
    """The rest is not read, and the score is kept apart from that of the whole."""
    scorer = await start(TroubledScorer(max_tokens=32), cache=ScoreCache(1 << 20))
    text = "word " * 40 + "red green"
    for _ in range(2):
        assert values(await raw(scorer, "red green", [text], long_documents="first")) == [0.0]
        assert values(await raw(scorer, "red green", [text])) == [1.0]
        assert values(await raw(scorer, "red green", [text], max_document_tokens=41)) == [0.5]


async def test_at_most_so_many_parts(start):
    """What comes after them is not read."""
    scorer = await start(TroubledScorer(max_tokens=32))
    (one,) = (await raw(scorer, "red green", ["word " * 1000 + "red"])).documents
    assert (one.raw, one.passages) == (0.0, LIMITS.max_windows)


async def test_a_long_query_is_cut_with_a_receipt(start):
    """Only its beginning is used, and that is said; a long document never takes its room."""
    scorer = await start(TroubledScorer(max_tokens=32))
    long = " ".join(f"q{number}" for number in range(100))
    made = await raw(scorer, long, ["q0 q1", "q99", "word " * 500])
    assert made.query_cut
    assert values(made) == [2 / 16, 0.0, 0.0]
    assert all(len(window.query.ids) == 16 for window in scorer.backend.scored)


# --- what is computed once ------------------------------------------------------------------------------------------


async def test_identical_pairs_in_flight_are_computed_once(start):
    """Whoever wants them: each caller gets the score, the model sees one pair."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    tasks = [asyncio.create_task(raw(scorer, "red", ["red", "green", "red"], caller=name)) for name in "abc"]
    await until(lambda: scorer.batcher.depth(Lane.QUERY) == 7)
    backend.let_go.set()
    assert [values(await task) for task in tasks] == [[1.0, 0.0, 1.0]] * 3
    await busy
    assert len(backend.scored) == 3


async def test_documents_are_tokenised_once(start):
    """Another query finds their tokens kept."""
    backend = TroubledScorer()
    scorer = await start(backend)
    for query in ("red", "green"):
        await raw(scorer, query, ["red", "green blue"])
    assert backend.tokenized == [["red", "green blue"]]


async def test_known_scores_are_not_computed_again(start):
    """They come from the cache as they were, and cost no tokens of the tokenizer nor of the model."""
    backend = TroubledScorer()
    scorer = await start(backend, cache=ScoreCache(1 << 20))
    made = await raw(scorer, "red", ["red", "green"])
    before = len(backend.scored)
    again = await raw(scorer, "red", ["blue", "green", "red"])
    assert [one.cached for one in again.documents] == [False, True, True]
    assert [one._replace(cached=False) for one in again.documents[1:]] == made.documents[::-1]
    assert [len(window.document.ids) for window in backend.scored[before:]] == [1]
    assert backend.tokenized == [["red", "green"], ["blue"]]


# --- deadlines ------------------------------------------------------------------------------------------------------


async def test_at_the_deadline_the_scored_ones_return(start):
    """A deadline that comes while the model is busy leaves the rest without a score; those before it have theirs."""
    backend = TroubledScorer()
    scorer = await start(backend)
    texts = [*(f"red {number}" for number in range(SORT_WINDOW)), "hang", *(f"red {n}" for n in range(100, 200))]
    made = await raw(scorer, "red", texts, deadline=Deadline.after(0.2), allow_partial=True)
    scored = [index for index, one in enumerate(made.documents) if one is not None]
    assert scored
    assert all(index <= SORT_WINDOW for index in scored)
    assert scorer.waiting(Lane.QUERY) == 0


async def test_a_document_half_scored_at_the_deadline(start):
    """It has the score of the parts that were read, is marked, and is not kept."""
    backend = TroubledScorer(max_tokens=32)
    limits = ScorerLimits(512, 4000, 1, 30, 1 << 20, 0, 64)
    cache = ScoreCache(1 << 20)
    scorer = await start(backend, limits, cache=cache)
    text = "red " + "word " * (31 * 40) + "hang"
    (one,) = (await raw(scorer, "red", [text], deadline=Deadline.after(0.3), allow_partial=True)).documents
    assert (one.raw, one.complete) == (1.0, False)
    assert 0 < one.passages < 41
    backend.let_go.set()
    (whole,) = (await raw(scorer, "red", [text])).documents
    assert (whole.complete, whole.cached, whole.passages) == (True, False, 41)


async def test_without_partial_answers_a_deadline_is_an_error(start):
    """Whether it comes in the queue, while texts are tokenised, or before anything."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    for deadline in (Deadline.after(0.05), Deadline.after(-1)):
        with pytest.raises(DeadlineExceeded):
            await raw(scorer, "red", ["red", "green"], deadline=deadline)
    backend.let_go.set()
    await busy
    assert scorer.waiting(Lane.QUERY) == 0


# --- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", ["a", "b"])
async def test_a_thousand_documents_do_not_hold_up_ten(start, caller):
    """Ten documents that come second are scored in the next few batches, in the same lane, whosever they are."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    many = [f"word{number} " + "x " * 100 for number in range(1000)]
    long = asyncio.create_task(raw(scorer, "red", many, lane=Lane.BULK, caller="a"))
    await until(lambda: scorer.batcher.depth(Lane.BULK) == CHUNK_ITEMS)
    few = [f"red{number} " + "x " * 100 for number in range(10)]
    short = asyncio.create_task(raw(scorer, "blue", few, lane=Lane.BULK, caller=caller))
    await until(lambda: scorer.batcher.depth(Lane.BULK) == CHUNK_ITEMS + 10)
    assert scorer.waiting(Lane.BULK) == 1010
    backend.let_go.set()
    await short
    seen = [window.query.key for batch in backend.batches[1:5] for window in batch]
    assert seen.count(backend.tokenize_query("blue").key) == 10
    assert not long.done()
    assert len(values(await long)) == 1000
    await busy


async def test_many_requests_share_the_model_evenly(start):
    """When half of the work of sixteen equal requests is done, each has had at least half its share of that."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    tasks = [
        asyncio.create_task(raw(scorer, f"query{one}", [f"text{one} " + "x " * (7 * n % 90) for n in range(20)]))
        for one in range(16)
    ]
    await until(lambda: scorer.batcher.depth(Lane.QUERY) == 1 + 16 * 20)
    backend.let_go.set()
    await asyncio.gather(busy, *tasks)
    served = [window.query.key for window in backend.scored[1:]]
    assert len(served) == 320
    half = [served[:160].count(backend.tokenize_query(f"query{one}").key) for one in range(16)]
    assert min(half) >= 5


async def test_who_goes_away_leaves_the_queue(start):
    """What nobody waits for is dropped before the model sees it, untokenised documents too."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    gone = asyncio.create_task(raw(scorer, "red", [f"text {number}" for number in range(500)]))
    await until(lambda: scorer.batcher.depth(Lane.QUERY) > 1)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert (scorer.waiting(Lane.QUERY), scorer.batcher.depth(Lane.QUERY)) == (1, 1)
    backend.let_go.set()
    await busy
    assert values(await raw(scorer, "red", ["red"])) == [1.0]
    assert len(backend.scored) == 2


async def test_a_full_queue_refuses_at_once(start):
    """Beyond the documents that may wait nothing is begun; a request of any number of parts counts by its documents."""
    backend = TroubledScorer(max_tokens=32)
    limits = ScorerLimits(2048, 10, 1, 30, 1 << 20, 4, 8)
    scorer = await start(backend, limits)
    busy = await hang(scorer, backend)
    long = asyncio.create_task(raw(scorer, "red", [f"{number} " + "word " * 1000 for number in range(9)]))
    await until(lambda: scorer.waiting(Lane.QUERY) == 10)
    with pytest.raises(Overloaded):
        await raw(scorer, "red", ["one more"])
    other = asyncio.create_task(raw(scorer, "red", ["another lane"], lane=Lane.BULK))
    await until(lambda: scorer.waiting(Lane.BULK) == 1)
    backend.let_go.set()
    assert values(await other) == [0.0]
    await asyncio.gather(busy, long)


# --- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "error"), [("poison", BackendFailed), ("odd", BackendFailed), ("huge", OutOfMemory)])
async def test_only_those_concerned_fail(start, word, error):
    """A document that the model raises on, gives no number for or has no room for fails its request, and no other."""
    backend = TroubledScorer()
    scorer = await start(backend)
    busy = await hang(scorer, backend)
    good = [asyncio.create_task(raw(scorer, "red", [f"red {n}", f"text {n}"])) for n in range(10)]
    bad = asyncio.create_task(raw(scorer, "red", ["red", word, "green"]))
    await until(lambda: scorer.batcher.depth(Lane.QUERY) == 24)
    backend.let_go.set()
    with pytest.raises(error) as caught:
        await bad
    assert "cannot bear" not in caught.value.message
    assert [values(await one) for one in good] == [[1.0, 0.0]] * 10
    await busy
    assert scorer.problems() == []
    assert scorer.waiting(Lane.QUERY) == 0


async def test_a_tokenizer_that_raises(start):
    """Its request fails, the next one is served."""
    scorer = await start(TroubledScorer())
    with pytest.raises(BackendFailed):
        await raw(scorer, "red", ["red", "untokenizable"])
    assert values(await raw(scorer, "red", ["red"])) == [1.0]


async def test_a_model_that_hangs(start):
    """Waiters fail when the heartbeat trips, those who come later at once, and the scorer says why."""
    backend = TroubledScorer()
    scorer = await start(backend, ScorerLimits(2048, 4000, 1, 0.2, 1 << 20, 4, 8))
    busy = await hang(scorer, backend)
    waiting = asyncio.create_task(raw(scorer, "red", ["red"]))
    for task in (busy, waiting):
        with pytest.raises(NotReady):
            await task
    with pytest.raises(NotReady):
        await raw(scorer, "red", ["red"])
    assert "hung" in scorer.problems()[0]
    backend.let_go.set()
    assert not backend.closed


async def test_the_model_is_closed_at_the_end(start):
    """Its memory is given back, after the worker has stopped."""
    backend = TroubledScorer()
    scorer = await start(backend)
    await scorer.aclose()
    assert backend.closed


# --- token vectors that processes share -----------------------------------------------------------------------------


class Shelf:
    """Bytes by key, as other processes left them."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.asked: list[list[bytes]] = []

    async def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """See SharedBytes."""
        self.asked.append(keys)
        return [self.held.get(key) for key in keys]

    def put_later(self, entries: dict[bytes, bytes]) -> None:
        """See SharedBytes."""
        self.held |= entries


async def test_token_vectors_travel(start):
    """What one process made another takes, in one look-up; what is known is not asked for again."""
    shelf = Shelf()
    one, other = SharingScorer(), SharingScorer()
    await raw(await start(one, vectors=shelf), "red", ["red", "green"])
    made = dict(shelf.held)
    assert len(made) == 2
    scorer = await start(other, vectors=shelf)
    shelf.asked.clear()
    assert values(await raw(scorer, "blue", ["red", "green", "blue"])) == [0.0, 0.0, 1.0]
    assert dict(other.taken) == made
    assert [len(keys) for keys in shelf.asked] == [3]
    await raw(scorer, "red", ["red", "green", "blue"])
    assert len(shelf.asked) == 1


async def test_warm_up_leaves_no_token_vectors():
    """What batches cost is measured with documents never seen before; nothing of them is offered to other processes."""
    shelf, backend = Shelf(), SharingScorer()
    scorer = Scorer(backend, LIMITS, vectors=shelf)
    try:
        await scorer.start()
        seen = [window.document.key for window in backend.scored]
        assert len(seen) == len(set(seen)) > 100
        assert scorer.batcher.cost.ready
        assert max(len(window.document.ids[: window.end]) for window in backend.scored) > 200
        assert values(await raw(scorer, "word", ["word", "word " * 200])) == [1.0, 1.0]
        assert len(shelf.held) == 2
    finally:
        await scorer.aclose()


# --- classification -------------------------------------------------------------------------------------------------


async def test_texts_are_classified_whole(start):
    """A text alone is read up to the model's limit, not to half of it; of two texts the first part of the second is."""
    scorer = await start(LabellingScorer("red", "green", max_tokens=32))
    alone = "word " * 30 + "red red green"
    rows, timings = await scorer.classify([(alone, None), ("red", "green"), (alone, None)], OPTIONS)
    assert [row.tolist() for row, _ in rows] == [[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]]
    assert [tokens for _, tokens in rows] == [32, 2, 32]
    assert timings.inference_ms > 0
    assert scorer.waiting(Lane.QUERY) == 0


async def test_classifying_in_vain(start):
    """A deadline that passes is an error."""
    scorer = await start(LabellingScorer("red", "green"))
    with pytest.raises(DeadlineExceeded):
        await scorer.classify([("red", None)], ScoreOptions(Lane.QUERY, Deadline.after(-1)))
