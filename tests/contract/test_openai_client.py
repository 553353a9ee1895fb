"""OpenAI's dialect with OpenAI's own client, and with LangChain's and LlamaIndex's classes on top of it."""

import base64
from collections.abc import Iterator

import httpx2
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding

from services.common.model_files import DEFAULT_MODEL
from tests.contract.conftest import TEXTS, assert_same_vectors, embedding_service

pytestmark = pytest.mark.slow

KEY = "a-key-for-these-tests"


@pytest.fixture
def sdk(server: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not retry."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
def test_vectors_are_those_of_sentence_transformers(sdk, reference, options):
    """Whatever the encoding, and with the client's own choice (base64), the vectors are right and in order."""
    reply = sdk.embeddings.create(input=TEXTS, model=DEFAULT_MODEL, **options)
    assert (reply.object, reply.model) == ("list", DEFAULT_MODEL)
    assert [(item.object, item.index) for item in reply.data] == [("embedding", index) for index in range(len(TEXTS))]
    vectors = [item.embedding for item in reply.data]
    if options.get("encoding_format") == "base64":  # Asked for by name, the client hands it on as it is.
        vectors = [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in vectors]
    assert_same_vectors(vectors, reference)


async def test_the_async_client_embeds_one_text(server, reference):
    """A string is one text; the asynchronous client reads the same reply."""
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        reply = await client.embeddings.create(input=TEXTS[0], model=DEFAULT_MODEL, user="somebody")
    assert_same_vectors([item.embedding for item in reply.data], reference[:1])


def test_token_ids_are_used_as_they_are(sdk, http, reference):
    """Ids with the special tokens in give the text's own vector; nothing is put before them, nothing after."""
    tokenized = http.post("/tei/tokenize", json={"inputs": TEXTS[:4]}).json()
    ids = [[token["id"] for token in text] for text in tokenized]
    reply = sdk.embeddings.create(input=ids, model=DEFAULT_MODEL)
    assert_same_vectors([item.embedding for item in reply.data], reference[:4])
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    one = sdk.embeddings.create(input=ids[0], model=DEFAULT_MODEL)
    assert_same_vectors([one.data[0].embedding], reference[:1])
    bare = sdk.embeddings.create(input=ids[0][1:-1], model=DEFAULT_MODEL)
    assert bare.usage.prompt_tokens == len(ids[0]) - 2


def test_usage_and_the_body_are_openais(http):
    """The reply has OpenAI's keys and no others; usage counts real tokens, special tokens included."""
    reply = http.post("/v1/embeddings", json={"input": "a cat", "model": DEFAULT_MODEL}).json()
    assert set(reply) == {"object", "data", "model", "usage"}
    assert set(reply["data"][0]) == {"object", "index", "embedding"}
    assert reply["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_fields_that_are_not_known_are_ignored(sdk, reference):
    """As at OpenAI's, a field that some framework adds does no harm; nor does a null."""
    extra = {"truncate": "END", "encoding_format": None}
    reply = sdk.embeddings.create(input=TEXTS[0], model=DEFAULT_MODEL, extra_body=extra)
    assert len(reply.data[0].embedding) == reference.shape[1]


def test_two_thousand_and_forty_eight_inputs(sdk):
    """2,048 inputs are answered in order, one more is refused."""
    texts = [f"number {number}" for number in range(2048)]
    reply = sdk.embeddings.create(input=texts, model="fake")
    assert [item.index for item in reply.data] == list(range(2048))
    last = sdk.embeddings.create(input=texts[-1], model="fake")
    assert reply.data[-1].embedding == pytest.approx(last.data[0].embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="2049") as caught:
        sdk.embeddings.create(input=[*texts, "one more"], model="fake")
    assert caught.value.param == "input"


def test_white_space_is_a_text(sdk):
    """A text of white space is embedded, as at OpenAI's; only the empty string is refused."""
    assert len(sdk.embeddings.create(input=[" ", "\n\t"], model=DEFAULT_MODEL).data) == 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"input": ""}, "input.0"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": []}, "input"),
        ({"input": [[1, 2], []]}, "input.1"),
        ({"input": [101, 999_999, 102]}, "input.0"),
        ({"input": [[101, 102], [30_522]]}, "input.1"),
        ({"input": [-1]}, "input.0"),
        ({"input": ["a", 5]}, "input.1"),
        ({"input": None}, "input"),
        ({"input": "a", "dimensions": 128}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 100_000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
    ids=str,
)
def test_bad_requests_are_400_with_openais_error(sdk, options, param):
    """The client raises BadRequestError, which names the field or the input at fault and carries the request's id."""
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.embeddings.create(model=DEFAULT_MODEL, **options)
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert isinstance(error.code, str)
    assert error.code
    assert error.request_id == error.response.headers["x-request-id"]
    assert isinstance(error.body, dict)
    assert {"message", "type", "param", "code"} <= set(error.body)


def test_dimensions_may_be_the_models_own(sdk):
    """Asking for the size that the vectors have is no cut."""
    assert len(sdk.embeddings.create(input="a", model=DEFAULT_MODEL, dimensions=384).data[0].embedding) == 384


def test_an_unknown_model_is_not_found(sdk):
    """The error names the models that there are."""
    for call in (
        lambda: sdk.embeddings.create(input="a", model="text-embedding-3-small"),
        lambda: sdk.models.retrieve("text-embedding-3-small"),
    ):
        with pytest.raises(openai.NotFoundError, match=DEFAULT_MODEL) as caught:
            call()
        assert (caught.value.param, caught.value.code) == ("model", "not_found")


def test_models_are_listed_and_described(sdk):
    """Every model is listed, the default first, and may be asked for by any of its names."""
    listed = list(sdk.models.list())
    assert [model.id for model in listed] == [DEFAULT_MODEL, "fake"]
    assert sdk.models.retrieve(DEFAULT_MODEL) == listed[0]
    assert listed[0].object == "model"
    assert isinstance(listed[0].created, int)


def test_replies_carry_the_request_id(sdk):
    """The client finds the request's id where OpenAI puts it."""
    assert sdk.embeddings.create(input="a", model="fake")._request_id


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[str]:
    """A service that wants a key and lets two requests a second through, one at a time."""
    limits = {"api_key": KEY, "requests_per_s": "2", "requests_burst": "1"}
    with embedding_service(tmp_path_factory.mktemp("guarded"), model="fake", **limits) as url:
        yield url


def test_a_wrong_key_is_an_authentication_error(guarded):
    """401 in OpenAI's shape; the client does not retry it."""
    with (
        openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.embeddings.create(input="a", model="fake")
    assert (caught.value.code, caught.value.type) == ("unauthenticated", "authentication_error")


def test_a_caller_over_its_rate_is_told_when_to_come_again(guarded):
    """429 with Retry-After: without retries RateLimitError, with them the client waits and succeeds."""

    def ask(client: openai.OpenAI) -> int:
        raw = client.embeddings.with_raw_response.create(input="a", model="fake")
        assert len(raw.parse().data) == 1
        return raw.retries_taken

    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY) as client:
        assert max(ask(client) for _ in range(3)) >= 1
        with pytest.raises(openai.RateLimitError) as caught:
            list(map(ask, [client.with_options(max_retries=0)] * 20))
    assert caught.value.type == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_teis_clients_meet_the_same_guard(guarded):
    """The same two errors in TEI's shape, and in that of the plain services; health needs no key."""
    with httpx2.Client(base_url=guarded, headers={"authorization": f"Bearer {KEY}"}) as client:
        answers = [client.post("/tei/embed", json={"inputs": "a"}) for _ in range(20)]
        limited = next(answer for answer in answers if answer.status_code == 429)
        assert set(limited.json()) == {"error", "error_type"}
        assert limited.json()["error_type"] == "Overloaded"
        assert int(limited.headers["retry-after"]) >= 1
    with httpx2.Client(base_url=guarded) as client:
        assert client.post("/tei/embed", json={"inputs": "a"}).status_code == 401
        assert client.post("/api/v1/embed", json={"inputs": "a"}).json()["code"] == "unauthenticated"
        assert [client.get(f"/tei/{path}").status_code for path in ("health", "ping")] == [200, 200]


# --- frameworks on top of the client --------------------------------------------------------------------------------


async def test_langchains_openai_embeddings(server, reference):
    """LangChain's class, told not to tokenise with OpenAI's vocabulary, embeds documents and queries."""
    embeddings = OpenAIEmbeddings(
        model=DEFAULT_MODEL, base_url=f"{server}/v1", api_key="unused", check_embedding_ctx_length=False, chunk_size=2
    )
    assert_same_vectors(embeddings.embed_documents(TEXTS), reference)
    assert_same_vectors([embeddings.embed_query(TEXTS[0])], reference[:1])
    assert_same_vectors(await embeddings.aembed_documents(TEXTS), reference)


async def test_llama_indexs_openai_embedding(server, reference):
    """LlamaIndex's class embeds texts and queries, alone and in batches."""
    embedding = OpenAIEmbedding(
        model_name=DEFAULT_MODEL, api_base=f"{server}/v1", api_key="unused", embed_batch_size=3, max_retries=1
    )
    assert_same_vectors(embedding.get_text_embedding_batch(TEXTS), reference)
    assert_same_vectors([embedding.get_query_embedding(TEXTS[0])], reference[:1])
    assert_same_vectors(await embedding.aget_text_embedding_batch(TEXTS), reference)
