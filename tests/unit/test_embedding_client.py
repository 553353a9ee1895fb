"""Search's client of the embedding service: what goes to which of its addresses."""

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import orjson
import pytest

from services.common.breaker import Breaker
from services.common.deadline import NO_DEADLINE
from services.common.http_client import ServiceClient
from services.search.clients import HttpEmbeddingClient
from tests.peer_server import Peer, json

VECTOR = base64.b64encode(np.array([1.0, 0.0], "<f4").tobytes()).decode()
REPLY = {
    "data": [{"index": 0, "embedding": VECTOR, "tokens": 1, "truncated": False}],
    "model": "m",
    "fingerprint": "f",
    "usage": {"prompt_tokens": 1, "total_tokens": 1, "cached_tokens": 0},
    "timings": {"tokenization_ms": 0.0, "queue_ms": 0.0, "inference_ms": 0.0},
}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """What has to be closed."""
    async with AsyncExitStack() as stack:
        yield stack


async def test_large_batches_go_to_the_bulk_address_and_back_when_it_is_gone(stack: AsyncExitStack) -> None:
    """Questions are asked at the first address; documents at the other, and at the first while that does not answer."""
    first = await stack.enter_async_context(Peer([json(REPLY)]))
    bulk = await stack.enter_async_context(Peer([json(REPLY)]))
    clients = [ServiceClient(name, peer.url, Breaker(name)) for name, peer in (("one", first), ("two", bulk))]
    for client in clients:
        stack.push_async_callback(client.aclose)
    embedding = HttpEmbeddingClient(*clients)
    await embedding.embed_query("a question", NO_DEADLINE)
    await embedding.embed_documents(["a document"], NO_DEADLINE)
    await embedding.embed_queries(["a question of many"], NO_DEADLINE)
    assert [len(peer.requests) for peer in (first, bulk)] == [1, 2]
    assert orjson.loads(bulk.requests[0].content)["lane"] == "bulk"
    await bulk.stop()
    made = await embedding.embed_documents(["another"], NO_DEADLINE)
    assert made.vectors.tolist() == [[1.0, 0.0]]
    assert len(first.requests) == 2
