"""
Prints what LangChain's HuggingFaceEndpointEmbeddings makes of texts, through TEI's routes, as JSON.

Usage: embed_texts.py URL, a JSON list of texts on standard input. Runs in the environment of
requirements.txt beside this file.
"""

import asyncio
import json
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from langchain_huggingface import HuggingFaceEndpointEmbeddings


def main(url: str, texts: list[str]) -> dict[str, object]:
    """Embed *texts* in every way that the class has."""
    embeddings = HuggingFaceEndpointEmbeddings(model="local/model", model_kwargs={"truncate": True})
    # Newer versions take no URL as the model's name; the clients that they make do.
    embeddings.client = InferenceClient(base_url=url)
    embeddings.async_client = AsyncInferenceClient(base_url=url)
    return {
        "documents": embeddings.embed_documents(texts),
        "query": embeddings.embed_query(texts[0]),
        "async_documents": asyncio.run(embeddings.aembed_documents(texts)),
    }


if __name__ == "__main__":
    json.dump(main(sys.argv[1], json.load(sys.stdin)), sys.stdout)
