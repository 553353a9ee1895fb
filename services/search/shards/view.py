"""What a search sees of a shard: everything as of one moment, and how it is searched. No method waits or locks."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import structlog
from pyroaring import BitMap

from services.common.errors import InvalidInput
from services.search.filters import Expression
from services.search.ports import Candidate, LexicalStatistics, ShardAnswer, ShardQuery
from services.search.shards.attributes import AttributeIndex
from services.search.shards.ids import IdArena
from services.search.shards.lexical import LexicalView
from services.search.shards.vectors import VectorView

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ShardView:
    """
    The live rows and the indexes' views as of *applied_seq*.

    *ids* and *attributes* go on growing; what they have beyond *live* is not looked at.
    """

    number: int
    applied_seq: int
    live: BitMap
    vectors: VectorView
    lexical: LexicalView
    ids: IdArena
    attributes: AttributeIndex

    def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        """
        Return document count and frequencies as BM25 counts them: documents deleted lately may be among them.

        Where the words cannot be read nothing is counted, so that the search, which finds out too, comes to be.
        """
        try:
            return LexicalStatistics(self.lexical.num_docs, self.lexical.doc_freq(terms))
        except Exception:
            _log.warning("words_not_counted", shard=self.number, exc_info=True)
            return LexicalStatistics(0, {})

    def allowed(self, expression: Expression | None) -> BitMap:
        """Return the live rows that match a filter."""
        return self.live if expression is None else self.attributes.resolve(expression, self.live)

    def search(self, query: ShardQuery) -> ShardAnswer:
        """
        Return the best candidates of each retriever that *query* has a part for.

        Where the words cannot be searched a query that has a vector is answered by that alone, as if it had no words.
        """
        moments = [perf_counter()]
        estimated = None
        if query.explain and query.filter is not None:
            estimated = self.attributes.estimate(query.filter, self.live)
        allowed = self.allowed(query.filter)
        moments.append(perf_counter())
        dense: dict[int, float] = {}
        vector_plan: dict[str, Any] | None = None
        if query.vector is not None:
            answer = self.vectors.search(query.vector, query.limit, allowed, exact=query.exact)
            dense = dict(zip(answer.rows.tolist(), answer.scores.tolist(), strict=True))
            vector_plan = answer.plan
        moments.append(perf_counter())
        lexical_failed = False
        bm25: dict[int, float] = {}
        counted = allowed
        try:
            bm25 = self._lexical(query, allowed)
            if query.facets and query.terms:
                counted = allowed & self.lexical.matching(query.terms, query.match, query.prefix)
        except InvalidInput:
            raise
        except Exception:
            if query.vector is None:
                raise
            lexical_failed, bm25 = True, {}
            _log.warning("words_not_searched", shard=self.number, exc_info=True)
        moments.append(perf_counter())
        candidates = self._candidates(query, dense, bm25)
        moments.append(perf_counter())
        facets = {field: self.attributes.counts(field, counted, limit) for field, limit in query.facets.items()}
        moments.append(perf_counter())
        stages = ("filter", "dense", "lexical", "score", "facets")
        timings_ms = {
            stage: (stop - start) * 1e3 for stage, start, stop in zip(stages, moments, moments[1:], strict=False)
        }
        plan = self._plan(query, allowed, estimated, vector_plan, len(bm25)) if query.explain else None
        return ShardAnswer(
            self.number, self.applied_seq, candidates, timings_ms, plan, facets, lexical_failed=lexical_failed
        )

    def _lexical(self, query: ShardQuery, allowed: BitMap) -> dict[int, float]:
        if not query.terms:
            return {}
        return dict(
            self.lexical.search(
                query.terms,
                query.limit,
                statistics=query.statistics,
                allowed=allowed,
                match=query.match,
                prefix=query.prefix,
            )
        )

    def _candidates(self, query: ShardQuery, dense: dict[int, float], bm25: dict[int, float]) -> list[Candidate]:
        """Return what either retriever found, each with its dense score whenever the query has a vector."""
        rows = list({**dense, **bm25})
        if query.vector is not None:
            others = [row for row in bm25 if row not in dense]
            if others:
                scores = self.vectors.score(query.vector, np.array(others, np.int64)).tolist()
                dense = {**dense, **dict(zip(others, scores, strict=True))}
        return [
            Candidate(id, self.number, row, dense.get(row), bm25.get(row))
            for row, id in zip(rows, self.ids.get(rows), strict=True)
        ]

    def _plan(
        self,
        query: ShardQuery,
        allowed: BitMap,
        estimated: float | None,
        vector_plan: dict[str, Any] | None,
        found: int,
    ) -> dict[str, Any]:
        """Return how the query was answered; *estimated* is how many rows the filter was thought to match."""
        live = len(self.live)
        plan: dict[str, Any] = {
            "filter": {
                "estimated": float(live) if estimated is None else estimated,
                "matched": len(allowed),
                "selectivity": len(allowed) / live if live else 0.0,
                "live": live,
            }
        }
        if vector_plan is not None:
            plan["vectors"] = vector_plan
        if query.terms:
            plan["lexical"] = {"match": query.match, "prefix": query.prefix, "terms": len(query.terms), "found": found}
        return plan
