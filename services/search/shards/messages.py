"""
What travels between the router and a shard node, as MessagePack.

A request is a map with the collection, mostly a shard's number, and what is asked; an answer is a map or a list.
Vectors are raw little-endian float32; filters are dicts, which the node parses; candidates are columns.

What the router reads may come from anybody who answers at a node's address: what is not of the right shape raises
DependencyUnavailable, as if nobody had answered.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import NoneType
from typing import Any, ParamSpec, TypeVar

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

P = ParamSpec("P")
T = TypeVar("T")


def _from_anybody(read: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise DependencyUnavailable(f"A shard node sent what cannot be read: {type(error).__name__}") from None

    return reading


def _all(values: Sequence[Any], *types: type) -> Any:
    """Return *values*, a list of which each is of one of *types*. Raises TypeError."""
    if type(values) is not list or not {type(value) for value in values} <= set(types):
        raise TypeError("not the expected values")
    return values


def _one(value: Any, *types: type) -> Any:
    return _all([value], *types)[0]


def _counts(found: Any) -> dict[str, int]:
    """Return *found*, a map of strings to whole numbers. Raises TypeError."""
    counts: dict[str, int] = _one(found, dict)
    _all(list(counts), str)
    _all(list(counts.values()), int)
    return counts


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


@_from_anybody
def statistics_in(found: Sequence[Any]) -> LexicalStatistics:
    """Return what `statistics_out` made a list of."""
    documents, doc_freq = found
    return LexicalStatistics(_one(documents, int), _counts(doc_freq))


@_from_anybody
def yes_in(found: Any) -> bool:
    """Read a yes or a no."""
    return _one(found, bool)  # type: ignore[no-any-return]


@_from_anybody
def seq_in(found: Any) -> int:
    """Read an operation's number."""
    return _one(found, int)  # type: ignore[no-any-return]


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
        "lexical_failed": answer.lexical_failed,
    }


@_from_anybody
def answer_in(found: Map) -> ShardAnswer:
    """Return the answer."""
    shard = _one(found["shard"], int)
    columns = (
        _all(found["ids"], str),
        _all(found["rows"], int),
        _all(found["dense"], float, NoneType),
        _all(found["bm25"], float, NoneType),
    )
    timings_ms = _one(found["timings_ms"], dict)
    _all(list(timings_ms), str)
    _all(list(timings_ms.values()), float, int)
    return ShardAnswer(
        shard=shard,
        applied_seq=_one(found["applied_seq"], int),
        candidates=[Candidate(id, shard, row, dense, bm25) for id, row, dense, bm25 in zip(*columns, strict=True)],
        timings_ms=timings_ms,
        plan=_one(found["plan"], dict, NoneType),
        facets={_one(field, str): _counts(counts) for field, counts in found["facets"].items()},
        catching_up=_one(found["catching_up"], bool),
        lexical_failed=_one(found["lexical_failed"], bool),
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


@_from_anybody
def documents_in(found: Sequence[Any]) -> dict[str, ShardDocument]:
    """Return stored fields by id."""
    return {
        _one(id, str): ShardDocument(
            id,
            _one(text, str),
            _one(title, str, NoneType),
            _one(metadata, dict),
            None if vector is None else _vector_in(vector),
            _one(seq, int),
        )
        for id, text, title, metadata, vector, seq in found
    }


def matches_out(matches: Sequence[Match]) -> list[Any]:
    """Return matches as a list."""
    return [[match.id, match.seq] for match in matches]


@_from_anybody
def matches_in(found: Sequence[Any]) -> list[Match]:
    """Return the matches."""
    return [Match(_one(id, str), _one(seq, int)) for id, seq in found]


def standings_out(standings: Sequence[ShardStanding]) -> list[Map]:
    """Return standings as maps."""
    return [asdict(standing) for standing in standings]


@_from_anybody
def standings_in(found: Sequence[Map]) -> list[ShardStanding]:
    """Return the standings."""
    return [ShardStanding(**standing) for standing in found]


def report_out(report: AuditReport) -> Map:
    """Return an audit's report as a map."""
    return asdict(report)


@_from_anybody
def report_in(found: Map) -> AuditReport:
    """Return the report."""
    return AuditReport(**found)


def _vector_out(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()


def _vector_in(raw: bytes) -> Vector:
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
