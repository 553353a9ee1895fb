"""The read path's ports as dictionaries, and a pipeline over them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np

from services.common.admission import Admission
from services.common.deadline import Deadline
from services.common.errors import NotFound, Unavailable
from services.common.wire.search import SearchReply, SearchRequest
from services.search.cache import MemoryResultCache
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.kept_answers import KeptAnswers
from services.search.pipeline import SearchPipeline
from services.search.ports import (
    CacheEntry,
    Candidate,
    Collection,
    CollectionState,
    Embedded,
    EmbeddingModel,
    Fetched,
    Highlight,
    MetadataValue,
    Reranked,
    RetrievalQuery,
    Retrieved,
    ShardDocument,
    Vector,
)
from services.search.quality import NOT_WATCHED
from services.search.stages import PipelineOptions
from services.search.watermarks import watermarks_of

MODEL = EmbeddingModel("m", "m@1", 2)
BOOKS = Collection("uuid-books", "books", "m", "m@1", 2, 2, 0.0)
OWN = Collection("uuid-own", "own", None, OWN_VECTORS, 2, 2, 0.0)
SEQ = 9


def found(id_: str, dense: float | None = None, bm25: float | None = None) -> Candidate:
    """Return a candidate of shard 0."""
    return Candidate(id_, 0, 0, dense, bm25)


class MemoryLedger:
    """The part of a ledger that searches read; *down* it raises, and *heard* is what this process knows if not all."""

    exclusive = False
    epoch = "first"

    def __init__(self) -> None:
        self.collections = {collection.name: collection for collection in (BOOKS, OWN)}
        self.seq = SEQ
        self.heard: int | None = None
        self.down = False
        self.asked = 0
        self.past: set[str] = set()

    async def shares_history(self, uuid: str, epoch: str, seq: int) -> bool:
        """Only the present epoch is this ledger's, and the one before it that ended in good order."""
        return epoch in self.past

    async def find_collection(self, name: str) -> Collection | None:
        if self.down:
            raise Unavailable("The database does not answer")
        return self.collections.get(name)

    async def list_collections(self) -> list[Collection]:
        if self.down:
            raise Unavailable("The database does not answer")
        return list(self.collections.values())

    async def state(self, uuid: str) -> CollectionState:
        self.asked += 1
        if self.down:
            raise Unavailable("The database does not answer")
        return CollectionState(self.seq, 4)

    def heard_seq(self, uuid: str) -> int:
        return self.seq if self.heard is None else self.heard


class MemoryRetriever:
    """Answers with the candidates it is given, by what the query asks for; *gone* documents cannot be fetched."""

    def __init__(self) -> None:
        self.candidates = [found("a", 0.9, 1.0), found("b", 0.8, 4.0), found("c", 0.7), found("d", 0.1, 2.0)]
        self.gone: set[str] = set()
        self.hanging: list[set[int]] = []  # Shards that cannot be read, by the calls of `fetch` from now on,
        self.late: set[int] = set()  # and those of them that ran out of time.
        self.answer = Retrieved((), 2, 2, 0, {}, 0, SEQ, {"dense": 1.0})
        self.queries: list[RetrievalQuery] = []
        self.fetched: list[list[str]] = []
        self.applied = True
        self.metadata: dict[str, dict[str, MetadataValue]] = {}
        self.vectors: dict[str, list[float]] = {}

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        self.queries.append(query)
        candidates = [
            replace(one, dense=one.dense if query.vector is not None else None, bm25=one.bm25 if query.text else None)
            for one in self.candidates
            if query.vector is not None or (query.text and one.bm25 is not None)
        ]
        return replace(self.answer, candidates=candidates if self.answer.ok else ())

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> Fetched:
        self.fetched.append([one.id for one in candidates])
        failed = self.hanging.pop(0) if self.hanging else set()

        def vector(id_: str) -> Vector | None:
            return np.array(self.vectors.get(id_, [0.6, 0.8]), dtype=np.float32) if vectors else None

        return Fetched(
            {
                one.id: ShardDocument(
                    one.id, f"text of {one.id}", f"title {one.id}", self.metadata.get(one.id, {"n": 1}), vector(one.id)
                )
                for one in candidates
                if one.id not in self.gone and one.shard not in failed
            },
            frozenset(failed),
            frozenset(failed & self.late),
        )

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        return self.applied

    async def applied_seq(self, collection: Collection) -> int:
        return SEQ


class Embedding:
    """Gives every text the same vector, or raises *error*; it has the models of *names*."""

    def __init__(self) -> None:
        self.model_is = MODEL
        self.error: Exception | None = None
        self.asked: list[tuple[str, Deadline]] = []
        self.names = {"m"}
        self.together: list[list[str]] = []

    async def model(self, deadline: Deadline, *, model: str | None = None) -> EmbeddingModel:
        return self.model_is

    async def embed_query(self, text: str, deadline: Deadline, *, model: str | None = None) -> Embedded:
        self.asked.append((text, deadline))
        if self.error:
            raise self.error
        if model not in self.names:
            raise NotFound(f"There is no model {model!r}", param="model")
        return Embedded(np.array([[1.0, 0.0]], dtype=np.float32), self.model_is)

    async def embed_queries(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """Give each text a vector by its length, so that tests see whose it is."""
        self.together.append(list(texts))
        if self.error:
            raise self.error
        rows = np.array([[1.0, len(text)] for text in texts], dtype=np.float32)
        return Embedded(rows, self.model_is)


class Reranker:
    """Scores texts by a table (`text of d` is best), or raises *error*."""

    def __init__(self) -> None:
        self.scores: dict[str, float | None] = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.9}
        self.error: Exception | None = None
        self.asked: list[list[str]] = []
        self.under_way = 4
        self.priors: list[list[float]] = []

    async def rerank(
        self, query: str, texts: Sequence[str], deadline: Deadline, *, priors: Sequence[float]
    ) -> Reranked:
        self.asked.append(list(texts))
        self.priors.append(list(priors))
        if self.error:
            raise self.error
        return Reranked([self.scores[text[-1]] for text in texts], "ranker", "r@1")


class WordHighlighter:
    """Marks each of the terms where it first occurs in the text."""

    def highlight(self, text: str, terms: Sequence[str], language: str, *, max_chars: int) -> Highlight | None:
        passage = text[:max_chars]
        marks = [(at, at + len(term)) for term in terms if (at := passage.find(term)) >= 0]
        return Highlight(passage, marks) if marks else None


class BrokenCache:
    """A cache that is out of reach."""

    available = False

    async def get(self, key: str) -> CacheEntry | None:
        return None

    async def put(self, key: str, entry: CacheEntry) -> None:
        raise AssertionError("nothing is put into a cache that is out of reach")


class Stack(SimpleNamespace):
    """The pipeline with the ports it stands on."""

    async def search(self, query: str | None = "why", *, timeout_s: float = 30.0, **fields) -> SearchReply:
        """Search the books."""
        request = SearchRequest(query=query, **{"collection": "books", **fields})
        return await self.pipeline.search(request, Deadline.after(timeout_s), request_id="r-1")


def make_stack(*, cache=None, admission=None, watch=NOT_WATCHED, **options) -> Stack:
    """Return a pipeline over fresh ports."""
    ledger, retriever, embedding, reranker = MemoryLedger(), MemoryRetriever(), Embedding(), Reranker()
    cache = cache or MemoryResultCache(max_bytes=1 << 20, ttl_s=60)
    seconds = count()  # A second passes between two looks at the clock: no name stays known to be true.
    catalog = Catalog(
        ledger,
        retriever,
        embedding,
        default_collection="books",
        default_shards=2,
        languages=("english",),
        clock=lambda: float(next(seconds)),
    )
    settings = {"candidates": 50, "rerank_candidates": 10, "dense_weight": 0.5, "rerank_blend": 1.0, **options}
    pipeline = SearchPipeline(
        catalog,
        ledger,
        retriever,
        embedding,
        reranker,
        KeptAnswers(cache, watermarks_of(ledger), ledger, list(settings.values()), stale_if_error_s=60.0),
        PipelineOptions(**settings),
        admission=admission or Admission("searches"),
        highlighter=WordHighlighter(),
        watch=watch,
        breakers=lambda: {"embedding": "closed", "rerank": "open"},
    )
    return Stack(
        ledger=ledger,
        retriever=retriever,
        embedding=embedding,
        reranker=reranker,
        cache=cache,
        catalog=catalog,
        pipeline=pipeline,
    )


def ids(reply: SearchReply) -> list[str]:
    """Return the order of the hits."""
    return [hit.id for hit in reply.hits]
