"""Asking a running stack all queries of a set, what it found at each stage, and the order that another blend would give."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
from ir_measures import nDCG

from benchmarks.rerank_sets import JudgedSet
from services.common.wire.search import Hit
from services.search.fusion import Ranked, blend
from services.search.ports import Candidate
from tercet.client import TercetClient

DEPTH = 50  # More than the reranker sees, so that every candidate that it scored is in the answer.
TIMEOUT_MS = 60_000
MEASURE = nDCG @ 10


@dataclass(frozen=True, slots=True)
class Run:
    """What the searches for a set's queries found, the mean time of one, and how many answers were degraded."""

    hits: dict[str, list[Hit]]
    ms: float
    degraded: int

    def ids(self) -> dict[str, list[str]]:
        """Return the ids found for each query, best first."""
        return {query: [hit.id for hit in hits] for query, hits in self.hits.items()}

    def blended(self, weight: float, most: int | None) -> dict[str, list[str]]:
        """
        Return the ids in the order that `rerank_blend` = *weight* gives, from the scores of each stage.

        *most* is how many a cascade's last model scores, which are the first ones of an answer; None: there is no cascade.
        """
        return {query: reblended(hits, weight, most) for query, hits in self.hits.items()}


def reblended(hits: Sequence[Hit], weight: float, most: int | None = None) -> list[str]:
    """Return the ids of *hits*, a reranked answer, as the reranker's share *weight* orders them; see `Run.blended`."""
    coarse = set() if most is None else {hit.id for hit in hits[most:]}
    ranked = []
    for hit in hits:
        stages = hit.stages
        fused = stages.fused if stages.fused is not None else hit.score
        ranked.append(Ranked(Candidate(hit.id, 0, 0, stages.dense, stages.bm25), fused, fused, "fused", stages.rerank))
    ranked.sort(key=lambda entry: (-entry.fused, entry.candidate.id))
    places = {at for at, entry in enumerate(ranked) if entry.candidate.id in coarse}
    order = blend(ranked, [entry.rerank for entry in ranked], weight=weight, coarse=places)
    return [entry.candidate.id for entry in order]


def per_query(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return nDCG@10 of each query of *qrels*; *run* has the ids found for each, best first."""
    scored = {query: {id_: float(-rank) for rank, id_ in enumerate(ids)} for query, ids in run.items()}
    judged = {query: dict(grades) for query, grades in qrels.items()}
    found = {each.query_id: float(each.value) for each in ir_measures.iter_calc([MEASURE], judged, scored)}
    return {query: found.get(query, 0.0) for query in qrels}


async def indexed(client: TercetClient, fingerprint: str, judged: JudgedSet) -> str:
    """Write the documents of *judged* unless they are there already; return the name of their collection."""
    digest = hashlib.sha256(f"{judged.digest} {fingerprint}".encode()).hexdigest()
    collection = f"{judged.name}-{digest[:16]}"
    found = await client.find_collection(collection)
    distinct = len({document["id"] for document in judged.documents})  # medquad names three of its texts twice
    if found is None or found.documents != distinct:
        print(f"Indexing {len(judged.documents):,} documents of {judged.name}", flush=True)
        await client.index(collection, judged.documents)
    return collection


async def ask(client: TercetClient, collection: str, judged: JudgedSet, **fields: Any) -> Run:
    """Ask every query of *judged*, one after the other, with *fields* and enough time for a whole answer."""
    hits: dict[str, list[Hit]] = {}
    degraded, seconds = 0, 0.0
    for id_, query in judged.queries.items():
        began = time.perf_counter()
        reply = await client.search(
            query=query, collection=collection, k=DEPTH, include=[], cache=False, timeout_ms=TIMEOUT_MS, **fields
        )
        seconds += time.perf_counter() - began
        degraded += bool(reply.degraded) or reply.coverage.ratio < 1
        hits[id_] = reply.hits
    return Run(hits, 1000 * seconds / len(hits), degraded)
