"""
Which text goes before an input: the model's own prompts, else those of its family, as its authors' model cards give them.

Sources (model cards on huggingface.co): intfloat/e5-*-v2 and multilingual-e5-* ("query: ", "passage: ");
multilingual-e5-large-instruct, e5-mistral-7b-instruct ("Instruct: {task}\\nQuery: {query}", nothing for documents);
BAAI/bge-*-en-v1.5 and bge-*-zh-v1.5 (an instruction for queries alone; bge-m3 wants none); thenlper/gte-* and
Alibaba-NLP/gte-*-v1.5 (none), gte-Qwen* ("Instruct: {task}\\nQuery: {query}"); nomic-ai/nomic-embed-text-v1 and -v1.5,
modernbert-embed-base ("search_query: ", "search_document: "); hkunlp/instructor-*; Qwen/Qwen3-Embedding-* ("Instruct:
{task}\\nQuery:{query}"); mixedbread-ai/mxbai-embed-*; Snowflake/snowflake-arctic-embed-* (v1: BGE's, v2: "query: ");
jinaai/jina-embeddings-v2-* (none), -v3 (its retrieval tasks); google/embeddinggemma-300m;
ibm-granite/granite-embedding-* (none).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import InvalidInput
from services.embedding.ports import InputType

_WEB_TASK = "Given a web search query, retrieve relevant passages that answer the query"
_INSTRUCT = f"Instruct: {_WEB_TASK}\nQuery: "
_PASSAGES = "Represent this sentence for searching relevant passages: "


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose names match *pattern* (lower case, without the organisation) want these prompts."""

    name: str
    pattern: str
    query: str
    document: str

    def prompts(self) -> dict[str, str]:
        """Return the prompts by name."""
        return {"query": self.query, "document": self.document}


# The first match counts, so the particular stand before the general.
FAMILIES = (
    Family("e5-instruct", r"e5-.*instruct|e5-mistral", _INSTRUCT, ""),
    Family("e5", r"(^|[-_])e5-", "query: ", "passage: "),
    Family("bge-en", r"bge-(small|base|large)-en", _PASSAGES, ""),
    Family("bge-zh", r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),
    Family("gte-qwen", r"gte-qwen", _INSTRUCT, ""),
    Family("nomic", r"nomic-embed-text|modernbert-embed", "search_query: ", "search_document: "),
    Family(
        "instructor",
        r"instructor-(base|large|xl)",
        "Represent the question for retrieving supporting documents: ",
        "Represent the document for retrieval: ",
    ),
    Family("qwen3-embedding", r"qwen3-embedding", f"Instruct: {_WEB_TASK}\nQuery:", ""),
    Family("mxbai", r"mxbai-embed", _PASSAGES, ""),
    Family("arctic-embed-v2", r"arctic-embed-[ml]-v2|arctic-embed-.*v2\.", "query: ", ""),
    Family("arctic-embed", r"arctic-embed", _PASSAGES, ""),
    Family(
        "jina-v3",
        r"jina-embeddings-v3",
        "Represent the query for retrieving evidence documents: ",
        "Represent the document for retrieval: ",
    ),
    Family("embeddinggemma", r"embeddinggemma", "task: search result | query: ", "title: none | text: "),
)


def family_of(name: str) -> Family | None:
    """Return the family that a model's name (a hub id, or a directory's path) shows, None where it shows none."""
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((family for family in FAMILIES if re.search(family.pattern, short)), None)


def complete_prompts(own: Mapping[str, str], name: str) -> tuple[dict[str, str], str | None]:
    """
    Return the prompts to serve a model with, and the family they come from, None when they are the model's own.

    A model that brings any prompt for queries or documents is taken at its word; `passage` and `corpus` are other
    names that models use for `document`.
    """
    prompts = dict(own)
    for other in ("passage", "corpus"):
        if other in prompts:
            prompts.setdefault("document", prompts[other])
    if "query" in prompts or "document" in prompts:
        return prompts, None
    family = family_of(name)
    if family is None:
        return prompts, None
    return {**family.prompts(), **prompts}, family.name


def prompt_for(
    prompts: Mapping[str, str], *, input_type: InputType | None, prompt_name: str | None, default: str | None = None
) -> str:
    """
    Return the text that goes before each input: of the prompt that was asked for, else of the model's *default*.

    Raises:
        InvalidInput: Both are given, or the model has no prompt of that name.
    """
    if prompt_name is None:
        return prompts.get(input_type or default or "", "")
    if input_type is not None:
        raise InvalidInput("prompt_name and input_type exclude each other: send one of them", param="prompt_name")
    if prompt_name not in prompts:
        there = ", ".join(sorted(prompts)) or "none"
        raise InvalidInput(
            f"The model has no prompt named {prompt_name[:100]!r}; there are: {there}", param="prompt_name"
        )
    return prompts[prompt_name]
