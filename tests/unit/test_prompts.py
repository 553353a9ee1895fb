"""Which text goes before an input: the model's own prompts, its family's, or none."""

import pytest

from services.common.errors import InvalidInput
from services.embedding.prompts import FAMILIES, complete_prompts, family_of, prompt_for


@pytest.mark.parametrize(
    ("model", "query", "document"),
    [
        ("intfloat/e5-small-v2", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "Instruct: Given a web search query", ""),
        ("intfloat/e5-mistral-7b-instruct", "Instruct: Given a web search query", ""),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
        ("BAAI/bge-base-zh-v1.5", "为这个句子生成表示以用于检索相关文章：", ""),
        ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", "Instruct: Given a web search query", ""),
        ("nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
        ("nomic-ai/modernbert-embed-base", "search_query: ", "search_document: "),
        ("hkunlp/instructor-large", "Represent the question", "Represent the document"),
        ("Qwen/Qwen3-Embedding-0.6B", "Instruct: Given a web search query", ""),
        ("mixedbread-ai/mxbai-embed-large-v1", "Represent this sentence for searching relevant passages: ", ""),
        ("Snowflake/snowflake-arctic-embed-m-v1.5", "Represent this sentence for searching", ""),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", ""),
        ("jinaai/jina-embeddings-v3", "Represent the query for retrieving evidence", "Represent the document"),
        ("google/embeddinggemma-300m", "task: search result | query: ", "title: none | text: "),
        ("/models/e5-base-v2/", "query: ", "passage: "),
    ],
)
def test_families_are_known_by_name(model, query, document):
    """A model without prompts of its own gets those of its family, as its authors publish them."""
    prompts, family = complete_prompts({}, model)
    assert family is not None
    assert prompts["query"].startswith(query)
    assert prompts["document"].startswith(document)
    assert bool(prompts["document"]) == bool(document)


@pytest.mark.parametrize(
    "model",
    [
        "all-MiniLM-L6-v2",
        "sentence-transformers/all-mpnet-base-v2",
        "thenlper/gte-small",
        "Alibaba-NLP/gte-base-en-v1.5",
        "BAAI/bge-m3",
        "jinaai/jina-embeddings-v2-base-en",
        "ibm-granite/granite-embedding-english-r2",
        "fake",
        "/models/something5-e",
    ],
)
def test_other_models_want_none(model):
    """Models that were trained without prompts get none."""
    assert family_of(model) is None
    assert complete_prompts({}, model) == ({}, None)


def test_the_models_own_prompts_count():
    """A model that brings prompts is taken at its word, even one that brings a query's only."""
    assert complete_prompts({"query": "q: "}, "intfloat/e5-small") == ({"query": "q: "}, None)


def test_other_words_for_documents():
    """`passage` and `corpus` are names that models use for what we call a document."""
    for name in ("passage", "corpus"):
        prompts, family = complete_prompts({name: "p: "}, "anything")
        assert (prompts["document"], family) == ("p: ", None)


def test_named_prompts_are_kept_beside_the_familys():
    """A model with prompts for other tasks still gets its family's for queries and documents."""
    prompts, family = complete_prompts({"clustering": "c: "}, "nomic-embed-text-v1")
    assert family == "nomic"
    assert prompts == {"clustering": "c: ", "query": "search_query: ", "document": "search_document: "}


def test_instructions_end_as_their_models_read_them():
    """Qwen3 is asked without a space after `Query:`, E5 and GTE with one."""
    ends = {family.name: family.query[-8:] for family in FAMILIES if family.query.startswith("Instruct")}
    assert ends == {"e5-instruct": "\nQuery: ", "gte-qwen": "\nQuery: ", "qwen3-embedding": "y\nQuery:"}


PROMPTS = {"query": "q: ", "document": "d: ", "clustering": "c: "}


def test_what_is_asked_is_what_goes_before():
    """input_type picks the query's or the document's prompt, prompt_name any; neither picks none."""
    assert prompt_for(PROMPTS, input_type=None, prompt_name=None) == ""
    assert prompt_for(PROMPTS, input_type="query", prompt_name=None) == "q: "
    assert prompt_for(PROMPTS, input_type="document", prompt_name=None) == "d: "
    assert prompt_for(PROMPTS, input_type=None, prompt_name="clustering") == "c: "
    assert prompt_for({}, input_type="query", prompt_name=None) == ""


def test_both_are_refused():
    """A prompt's name and an input type together could contradict each other."""
    with pytest.raises(InvalidInput) as caught:
        prompt_for(PROMPTS, input_type="query", prompt_name="query")
    assert caught.value.param == "prompt_name"


def test_an_unknown_name_is_told_those_there_are():
    """The error for a name that the model does not have lists its prompts, or says that there are none."""
    with pytest.raises(InvalidInput, match="clustering, document, query"):
        prompt_for(PROMPTS, input_type=None, prompt_name="sts")
    with pytest.raises(InvalidInput, match="there are: none"):
        prompt_for({}, input_type=None, prompt_name="sts")
