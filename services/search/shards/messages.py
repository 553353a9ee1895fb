"""
What travels between the router and a shard node, as MessagePack.

A request is a map with the collection, mostly a shard's number, and what is asked; an answer is a map or a list.
Vectors are raw little-endian float32; filters are dicts, which the node parses; candidates are columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ormsgpack

from services.common.errors import DependencyUnavailable, Malformed
from services.search.filters import parse_filter
from services.search.ports import (
    AuditReport,
    Candidate,
    Collection,
    LexicalStatistics,
    Match,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
    Vector,
)

MEDIA_TYPE = "application/msgpack"

Map = Mapping[str, Any]


def pack(value: Any) -> bytes:
    """Return *value* as bytes; numbers may be NumPy's."""
    return ormsgpack.packb(value, option=ormsgpack.OPT_SERIALIZE_NUMPY)


def unpack_request(content: bytes) -> Map:
    """Return a request's map. Raises Malformed."""
    try:
        found = ormsgpack.unpackb(content)
    except ValueError as error:
        raise Malformed(f"The body is not MessagePack: {error}", param="body") from None
    if not isinstance(found, dict):
        raise Malformed("The body must be a map", param="body")
    return found


def unpack_answer(content: bytes, host: str) -> Any:
    """Return what a node answered. Raises DependencyUnavailable, naming *host*, where it cannot be read."""
    try:
        return ormsgpack.unpackb(content)
    except ValueError:
        raise DependencyUnavailable(f"{host} sent an answer that cannot be read") from None


def collection_out(collection: Collection) -> Map:
    """Return a collection as a map."""
    found = {name: getattr(collection, name) for name in Collection.__slots__}
    found["attributes"] = None if collection.attributes is None else dict(collection.attributes)
    return found


def collection_in(found: Map) -> Collection:
    """Return the collection that `collection_out` made a map of. Raises Malformed."""
    try:
        return Collection(**found)
    except TypeError as error:
        raise Malformed(f"That is no collection: {error}", param="collection") from None


def statistics_out(statistics: LexicalStatistics) -> list[Any]:
    """Return statistics as a list."""
    return [statistics.documents, dict(statistics.doc_freq)]


def statistics_in(found: Sequence[Any]) -> LexicalStatistics:
    """Return what `statistics_out` made a list of."""
    return LexicalStatistics(found[0], found[1])


def filter_out(filter: Any) -> Map | None:
    """Return a parsed filter as a dict; None for none."""
    found: Map | None = None if filter is None else filter.as_dict()
    return found


def filter_in(found: Map | None, collection: Collection) -> Any:
    """Return the expression. Raises InvalidInput."""
    return parse_filter(found, collection.attributes)


def query_out(query: ShardQuery) -> Map:
    """Return a query as a map."""
    return {
        "limit": query.limit,
        "vector": None if query.vector is None else _vector_out(query.vector),
        "terms": list(query.terms),
        "statistics": None if query.statistics is None else statistics_out(query.statistics),
        "filter": filter_out(query.filter),
        "match": query.match,
        "prefix": query.prefix,
        "exact": query.exact,
        "explain": query.explain,
        "facets": dict(query.facets),
    }


def query_in(found: Map, collection: Collection) -> ShardQuery:
    """Return the query. Raises InvalidInput for its filter."""
    vector, statistics = found["vector"], found["statistics"]
    return ShardQuery(
        limit=found["limit"],
        vector=None if vector is None else _vector_in(vector),
        terms=found["terms"],
        statistics=None if statistics is None else statistics_in(statistics),
        filter=filter_in(found["filter"], collection),
        match=found["match"],
        prefix=found["prefix"],
        exact=found["exact"],
        explain=found["explain"],
        facets=found["facets"],
    )


def answer_out(answer: ShardAnswer) -> Map:
    """Return a shard's answer as a map."""
    candidates = answer.candidates
    return {
        "shard": answer.shard,
        "applied_seq": answer.applied_seq,
        "ids": [candidate.id for candidate in candidates],
        "rows": [candidate.row for candidate in candidates],
        "dense": [candidate.dense for candidate in candidates],
        "bm25": [candidate.bm25 for candidate in candidates],
        "timings_ms": dict(answer.timings_ms),
        "plan": None if answer.plan is None else dict(answer.plan),
        "facets": {field: dict(counts) for field, counts in answer.facets.items()},
        "catching_up": answer.catching_up,
    }


def answer_in(found: Map) -> ShardAnswer:
    """Return the answer."""
    shard = found["shard"]
    return ShardAnswer(
        shard=shard,
        applied_seq=found["applied_seq"],
        candidates=[
            Candidate(id, shard, row, dense, bm25)
            for id, row, dense, bm25 in zip(found["ids"], found["rows"], found["dense"], found["bm25"], strict=True)
        ],
        timings_ms=found["timings_ms"],
        plan=found["plan"],
        facets=found["facets"],
        catching_up=found["catching_up"],
    )


def documents_out(documents: Mapping[str, ShardDocument]) -> list[Any]:
    """Return stored fields as a list."""
    return [
        [
            document.id,
            document.text,
            document.title,
            dict(document.metadata),
            None if document.vector is None else _vector_out(document.vector),
            document.seq,
        ]
        for document in documents.values()
    ]


def documents_in(found: Sequence[Any]) -> dict[str, ShardDocument]:
    """Return stored fields by id."""
    return {
        id: ShardDocument(id, text, title, metadata, None if vector is None else _vector_in(vector), seq)
        for id, text, title, metadata, vector, seq in found
    }


def matches_out(matches: Sequence[Match]) -> list[Any]:
    """Return matches as a list."""
    return [[match.id, match.seq] for match in matches]


def matches_in(found: Sequence[Any]) -> list[Match]:
    """Return the matches."""
    return [Match(id, seq) for id, seq in found]


def standings_out(standings: Sequence[ShardStanding]) -> list[Map]:
    """Return standings as maps."""
    return [asdict(standing) for standing in standings]


def standings_in(found: Sequence[Map]) -> list[ShardStanding]:
    """Return the standings."""
    return [ShardStanding(**standing) for standing in found]


def report_out(report: AuditReport) -> Map:
    """Return an audit's report as a map."""
    return asdict(report)


def report_in(found: Map) -> AuditReport:
    """Return the report."""
    return AuditReport(**found)


def _vector_out(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()


def _vector_in(raw: bytes) -> Vector:
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
