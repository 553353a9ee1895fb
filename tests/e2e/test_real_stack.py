"""Three real processes with the real model, from the first document to the answer after a crash."""

from pathlib import Path

import pytest

from tests.e2e.stack import DOCUMENTS, kill, running, until


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_answers_degrades_recovers_and_keeps_everything(tmp_path: Path):
    """The stack answers by meaning; without embedding it answers by words, flagged; a restart finds every document."""
    async with running(tmp_path) as (stack, client):
        written = await client.write("facts", DOCUMENTS)
        assert (written.accepted, written.embedded, written.applied) == (len(DOCUMENTS), len(DOCUMENTS), True)

        async def ask(query: str, **fields: object) -> tuple[str, list[str]]:
            reply = await client.search(query=query, collection="facts", cache=False, timeout_ms=20_000, **fields)
            return reply.hits[0].id, list(reply.degraded)

        # No word of these questions is in the document that answers them.
        assert await ask("how do I make a loaf") == ("bread", [])
        assert await ask("insects telling each other where nectar is") == ("bees", [])
        full = await client.search(
            query="insects telling each other where nectar is", collection="facts", timeout_ms=20_000
        )
        assert full.pipeline.rerank == "tercet-reranker"
        assert full.hits[0].stages.rerank is not None
        assert full.coverage.ratio == 1.0
        again = await client.search(
            query="insects telling each other where nectar is", collection="facts", timeout_ms=20_000
        )
        assert again.cache.hit
        assert [hit.id for hit in again.hits] == [hit.id for hit in full.hits]

        kill(stack, "embedding")
        assert await ask("a mortgage from the bank") == ("loan", ["embedding_unavailable"])

        async def healthy() -> bool:
            return (await ask("how do I make a loaf")) == ("bread", [])

        await until(healthy, within_s=90)

        kill(stack, "search")
        await until(client.ready, within_s=60)
        for document in DOCUMENTS:
            assert (await client.get_document("facts", document["id"])).text == document["text"]
        rewritten = await client.write("facts", DOCUMENTS)
        assert (rewritten.unchanged, rewritten.embedded) == (len(DOCUMENTS), 0)
        await until(healthy, within_s=30)
