"""
Prints what LangChain's and Haystack's rerankers make of documents, through the rerank service, as JSON.

Usage: rerank_texts.py URL, `{"model", "query", "documents", "top_n"}` on standard input. Runs in the environment of
requirements.txt beside this file. Each answer is a list of [text, score], best first.
"""

import asyncio
import json
import sys
from typing import Any

from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker
from langchain_cohere import CohereRerank
from langchain_core.documents import Document

KEY = "unused"


def langchain(url: str, model: str, query: str, documents: list[str], top_n: int) -> dict[str, Any]:
    """Return what LangChain's class answers: as a compressor of documents, and asked for results, some of objects."""
    reranker = CohereRerank(model=model, base_url=url, cohere_api_key=KEY, top_n=top_n)
    compressed = reranker.compress_documents([Document(page_content=text) for text in documents], query)
    found = reranker.rerank(documents, query, top_n=None, max_tokens_per_doc=512)
    objects = reranker.rerank([{"text": text, "n": 1} for text in documents], query, rank_fields=["text"], top_n=top_n)
    return {
        "langchain": [[one.page_content, one.metadata["relevance_score"]] for one in compressed],
        "langchain results": [[documents[one["index"]], one["relevance_score"]] for one in found],
        "langchain objects": [[documents[one["index"]], one["relevance_score"]] for one in objects],
    }


def haystack(url: str, model: str, query: str, texts: list[str], top_n: int) -> dict[str, Any]:
    """Return what Haystack's three rankers answer, in both ways that each has."""
    key = Secret.from_token(KEY)
    rankers = {
        "cohere": CohereRanker(model=model, api_base_url=url, api_key=key, top_k=top_n),
        "jina": JinaRanker(model=model, base_url=f"{url}/v1/rerank", api_key=key, top_k=top_n),
        "vllm": VLLMRanker(model=model, api_base_url=f"{url}/v1", api_key=key, top_k=top_n),
        "vllm truncated": VLLMRanker(
            model=model, api_base_url=f"{url}/v1", top_k=top_n, extra_parameters={"truncate_prompt_tokens": 256}
        ),
    }
    documents = [HaystackDocument(content=text) for text in texts]
    made = {}
    for name, ranker in rankers.items():
        made[f"haystack {name}"] = ranker.run(query=query, documents=documents)
        made[f"haystack {name}, async"] = asyncio.run(ranker.run_async(query=query, documents=documents))
    return {name: [[one.content, one.score] for one in reply["documents"]] for name, reply in made.items()}


def haystacks_error(url: str, query: str, texts: list[str]) -> str:
    """Return what Haystack's Jina class says of a model that is not there."""
    ranker = JinaRanker(model="none-such", base_url=f"{url}/v1/rerank", api_key=Secret.from_token(KEY))
    try:
        ranker.run(query=query, documents=[HaystackDocument(content=text) for text in texts])
    except RuntimeError as error:
        return str(error)
    return ""


def main(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Rerank in every way."""
    question = asked["query"], asked["documents"]
    return {
        **langchain(url, asked["model"], *question, asked["top_n"]),
        **haystack(url, asked["model"], *question, asked["top_n"]),
        "error": haystacks_error(url, *question),
    }


if __name__ == "__main__":
    json.dump(main(sys.argv[1], json.load(sys.stdin)), sys.stdout)
