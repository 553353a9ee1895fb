"""Whether a collection ranks alike in one shard and in eight."""

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks import machine
from benchmarks.figures import number
from benchmarks.report import Row
from benchmarks.servers import Running, ServerFailed, ServerSpec, running, tercet
from tercet.client import TercetClient
from tercet.evaluation import MEASURE_NAMES, MODES, Beir, load_beir, measure

SHARDS = (1, 8)

_DATA = machine.ROOT.parent / "shared" / "data" / "scifact"
_MODES = ("lexical", "hybrid")
_MEASURE = MEASURE_NAMES[0]
_K = 100


def one_shard_against_eight(scratch: Path) -> Row:
    """Index SciFact into one shard and into eight, and compare what the judged queries are worth."""
    if not _DATA.exists():
        raise ServerFailed(f"the judged collection is not at {_DATA}")
    beir = load_beir(_DATA)
    row = Row(
        "sharding",
        f"The same collection in {SHARDS[0]} shard and in {SHARDS[1]}: SciFact, {len(beir.queries)} judged queries",
        f"Real embeddings; {_MEASURE}, without reranking. To reach: a difference of at most .005.",
        ("mode", *(f"{shards} shards" for shards in SHARDS), "difference"),
    )
    scores: dict[int, dict[str, float]] = {}
    with ExitStack() as stack:
        embedding = stack.enter_context(running([tercet()], scratch))
        model = next(iter(embedding.values()))
        model.resume()
        for shards in SHARDS:
            directory = scratch / f"sharding-{shards}"
            directory.mkdir()
            with running([_search(shards, model, directory)], directory) as servers:
                server = next(iter(servers.values()))
                server.resume()
                scores[shards] = asyncio.run(_scores(server, beir))
    for mode in _MODES:
        values = [scores[shards][mode] for shards in SHARDS]
        row.lines.append((mode, *(f"{value:.4f}" for value in values), f"{number(abs(values[0] - values[-1]))}"))
    return row


def _search(shards: int, embedding: Running, directory: Path) -> ServerSpec:
    return ServerSpec(
        "tercet-search",
        command=lambda port: [sys.executable, "-m", "services.search"],
        environ=lambda port: {
            "SEARCH_LISTEN_PORT": str(port),
            "SEARCH_DATA_DIR": str(directory / "data"),
            "SEARCH_EMBEDDING_URL": f"http://{embedding.host}:{embedding.port}",
            "SEARCH_DEFAULT_SHARDS": str(shards),
        },
        ready_path="/readyz",
        path="/search",
        body=lambda texts, fields: b"",
    )


async def _scores(server: Running, beir: Beir) -> dict[str, float]:
    async with TercetClient(f"http://{server.host}:{server.port}") as client:
        await client.index("scifact", beir.documents())
        scores = {}
        for mode in _MODES:
            run = {}
            for key, query in beir.queries.items():
                reply = await client.search(
                    query=query, collection="scifact", k=_K, include=[], cache=False, **MODES[mode]
                )
                run[key] = [hit.id for hit in reply.hits]
            scores[mode] = measure(beir.qrels, run)[_MEASURE]
        return scores
