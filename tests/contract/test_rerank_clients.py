"""
The rerank service with other people's clients, over a real socket: Cohere's own, and the rerankers of frameworks.

Cohere's newest SDK and LlamaIndex's classes run here; LangChain's and Haystack's, which want an older SDK, in an
environment of their own (tests/contract/clients).
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cohere
import cohere.errors
import httpx2
import pytest
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from tests.contract.conftest import model_service

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENTS_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
KEY = "a-key-for-these-tests"
QUERY = "red green blue white"
DOCUMENTS = ["red", "red green blue", "black", "red green"]
ORDER = [1, 3, 0, 2]
SCORES = [0.75, 0.5, 0.25, 0.0]
RANKED = list(zip(ORDER, SCORES, strict=True))
NO_RETRY = {"max_retries": 0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, clients_stay_here: None) -> Iterator[str]:
    """The base URL of a rerank service with the fake scorer: the share of the query's words."""
    with model_service("rerank", tmp_path_factory.mktemp("rerank"), model="fake") as url:
        yield url


@pytest.fixture(scope="module")
def v1(url: str) -> cohere.Client:
    """Cohere's client of its first API."""
    return cohere.Client(api_key=KEY, base_url=url)


@pytest.fixture(scope="module")
def v2(url: str) -> cohere.ClientV2:
    """Cohere's client of its second API."""
    return cohere.ClientV2(api_key=KEY, base_url=url)


# --- Cohere's SDK -------------------------------------------------------------------------------------------------


def test_cohere_v1(v1):
    """Indices and scores best first; a version, a search unit and an id."""
    reply = v1.rerank(query=QUERY, documents=DOCUMENTS)
    assert [(result.index, result.relevance_score) for result in reply.results] == RANKED
    assert all(result.document is None for result in reply.results)
    assert reply.id
    assert reply.meta.api_version.version == "1"
    assert reply.meta.billed_units.search_units == 1


def test_cohere_v1s_options(v1):
    """top_n, documents as strings and objects, rank_fields, documents in the reply, chunks."""
    documents = [{"text": "red", "title": "black"}, "red green", {"text": "black", "title": "red green blue"}]
    reply = v1.rerank(
        query=QUERY,
        documents=documents,
        model="fake",
        top_n=2,
        rank_fields=["title", "text"],
        return_documents=True,
        max_chunks_per_doc=4,
    )
    assert [result.index for result in reply.results] == [2, 1]
    assert reply.results[0].document.text == "black"
    assert reply.results[0].document.title == "red green blue"
    assert reply.results[1].document.text == "red green"


async def test_cohere_v1_async(url):
    """The asynchronous client reads the same reply."""
    reply = await cohere.AsyncClient(api_key=KEY, base_url=url).rerank(query=QUERY, documents=DOCUMENTS, model="fake")
    assert [(result.index, result.relevance_score) for result in reply.results] == RANKED


def test_cohere_v2(v2):
    """The second API: its options, its version; nothing that it does not know."""
    reply = v2.rerank(model="fake", query=QUERY, documents=DOCUMENTS)
    assert [(result.index, result.relevance_score) for result in reply.results] == RANKED
    assert reply.meta.api_version.version == "2"
    assert reply.model_extra == {}
    few = v2.rerank(model="fake", query=QUERY, documents=DOCUMENTS, top_n=1, max_tokens_per_doc=100, priority=1)
    assert [result.index for result in few.results] == [1]


def test_cohere_v2s_relevant_spans(v2):
    """The best passage comes as a span, where there is one."""
    spans = cohere.RerankRelevantSpans(mode="enabled", threshold=0.6)
    reply = v2.rerank(model="fake", query=QUERY, documents=DOCUMENTS, relevant_spans=spans)
    ((span,), *others) = [result.relevant_spans for result in reply.results]
    assert (span.start, span.end, span.score) == (0, len(DOCUMENTS[1]), 0.75)
    assert others == [None, None, None]


async def test_cohere_v2_async(url):
    """The asynchronous client reads the same reply."""
    client = cohere.AsyncClientV2(api_key=KEY, base_url=url)
    reply = await client.rerank(model="fake", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [(result.index, result.relevance_score) for result in reply.results] == RANKED[:2]


def test_cohere_a_thousand_documents(v1, v2):
    """As many as the service takes in one request."""
    for client in (v1, v2):
        assert len(client.rerank(model="fake", query=QUERY, documents=["red"] * 1000).results) == 1000


@pytest.mark.parametrize(
    ("options", "kind", "part"),
    [
        ({"documents": []}, cohere.UnprocessableEntityError, "documents"),
        ({"documents": ["red"] * 1001}, cohere.UnprocessableEntityError, "documents"),
        ({"documents": ["red", 5]}, cohere.UnprocessableEntityError, "documents.1"),
        ({"query": ""}, cohere.UnprocessableEntityError, "query"),
        ({"top_n": -1}, cohere.UnprocessableEntityError, "top_n"),
        ({"model": "rerank-v3.5"}, cohere.NotFoundError, "fake"),
    ],
    ids=str,
)
def test_coheres_errors(v1, v2, options, kind, part):
    """The SDK raises the class that it has for the status; `message` names what is at fault."""
    for client in (v1, v2):
        with pytest.raises(kind) as caught:
            client.rerank(**{"model": "fake", "query": QUERY, "documents": DOCUMENTS, **options})
        assert part in caught.value.body["message"]


def test_cohere_objects_without_their_field(v1):
    """The item and the field are named."""
    with pytest.raises(cohere.UnprocessableEntityError) as caught:
        v1.rerank(query=QUERY, documents=["red", {"title": "green"}])
    assert caught.value.body["message"].startswith("documents.1.text")


def test_cohere_past_the_deadline(v1, v2):
    """A deadline that passes is the SDK's GatewayTimeoutError."""
    options = {**NO_RETRY, "additional_headers": {"x-deadline-ms": "0.001"}}
    for client in (v1, v2):
        with pytest.raises(cohere.GatewayTimeoutError):
            client.rerank(model="fake", query=QUERY, documents=["late"], request_options=options)


def test_cohere_with_a_key(tmp_path, clients_stay_here):
    """The SDK's key is a bearer token: the right one opens, a wrong one is UnauthorizedError."""
    with model_service("rerank", tmp_path, model="fake", api_key=KEY) as url:
        opened = cohere.ClientV2(api_key=KEY, base_url=url)
        assert len(opened.rerank(model="fake", query=QUERY, documents=DOCUMENTS).results) == 4
        with pytest.raises(cohere.UnauthorizedError):
            cohere.ClientV2(api_key="wrong", base_url=url).rerank(model="fake", query=QUERY, documents=DOCUMENTS)


# --- LlamaIndex ---------------------------------------------------------------------------------------------------


def nodes() -> list[NodeWithScore]:
    """The documents as LlamaIndex retrieves them."""
    return [NodeWithScore(node=TextNode(text=text), score=0.1) for text in DOCUMENTS]


def test_llama_indexs_jina_class(url):
    """LlamaIndex's class for Jina needs the base URL alone."""
    reranker = JinaRerank(base_url=f"{url}/v1", api_key=KEY, model="fake", top_n=3)
    ranked = reranker.postprocess_nodes(nodes(), query_bundle=QueryBundle(QUERY))
    assert [(node.text, node.score) for node in ranked] == [(DOCUMENTS[at], score) for at, score in RANKED[:3]]


def test_llama_indexs_jina_class_tells_what_is_wrong(url):
    """It raises with `detail`, which names the model that there is."""
    reranker = JinaRerank(base_url=f"{url}/v1", api_key=KEY, model="jina-reranker-v2", top_n=3)
    with pytest.raises(RuntimeError, match="there is: fake"):
        reranker.postprocess_nodes(nodes(), query_bundle=QueryBundle(QUERY))


def test_llama_indexs_tei_class(url):
    """LlamaIndex's class for TEI needs the base URL, with /tei."""
    reranker = TextEmbeddingInference(base_url=f"{url}/tei", top_n=4)
    ranked = reranker.postprocess_nodes(nodes(), query_bundle=QueryBundle(QUERY))
    assert [(node.text, node.score) for node in ranked] == [(DOCUMENTS[at], score) for at, score in RANKED]


# --- LangChain and Haystack ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not CLIENTS_PYTHON.exists(), reason="`make test-clients` installs LangChain's and Haystack's classes"
)
def test_langchains_and_haystacks_classes(url):
    """LangChain's Cohere class and Haystack's for Cohere, Jina and vLLM, sync and async, on Cohere's older SDK."""
    asked = {"model": "fake", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    script = ROOT / "tests" / "contract" / "clients" / "rerank_texts.py"
    done = subprocess.run(
        [str(CLIENTS_PYTHON), str(script), url],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    expected = [[DOCUMENTS[at], score] for at, score in RANKED]
    assert "there is: fake" in made.pop("error")
    assert made.pop("langchain results") == expected
    assert len(made) == 10
    for name, ranked in made.items():
        assert ranked == expected[:3], name


# --- what no SDK is for -------------------------------------------------------------------------------------------


def test_over_a_real_socket(url):
    """The routes that have no client of their own answer over a socket too."""
    with httpx2.Client(base_url=url, timeout=60) as http:
        scores = http.post("/v1/score", json={"text_1": QUERY, "text_2": DOCUMENTS}).json()
        assert [item["score"] for item in scores["data"]] == [0.25, 0.75, 0.0, 0.5]
        assert http.get("/v1/models").json()["data"][0]["id"] == "fake"
        assert http.get("/tei/info").json()["model_id"] == "fake"
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/rerank", "/v1/rerank", "/v2/rerank", "/score", "/tei/rerank", "/tei/predict", "/v1/models"} <= set(
            paths
        )
