"""Several models in one service, through its API: names, loading on demand, /models and /info, settings."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import httpx2
import pytest

from services.common.errors import Unavailable
from services.embedding.app import create_app
from services.embedding.ports import Backend
from services.embedding.settings import EmbeddingSettings
from services.embedding.specs import ModelSpec
from tests.embedding_backends import PricedBackend, SizedBackend
from tests.integration.conftest import Serve, serving

MODELS = "fake,small=org/small-model,broken=org/broken;dimensions=any"


def load(spec: ModelSpec, _settings: EmbeddingSettings) -> Sequence[Backend]:
    """Fake models with fingerprints of their own; one cannot be loaded."""
    if spec.public_name == "broken":
        raise OSError("model.safetensors is missing")
    return [SizedBackend(name=spec.name, fingerprint=f"{spec.name}@1/256", weights_bytes=1000)]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with three models."""
    async with serve(create_app(EmbeddingSettings(model=MODELS), load=load)) as client:
        yield client


async def loaded(client: httpx2.AsyncClient) -> dict[str, bool]:
    """Return which models are in memory."""
    return {card["id"]: card["loaded"] for card in (await client.get("/models")).json()["data"]}


async def test_models_are_listed(client):
    """/models names them with the other names that lead to them; only the default is loaded at the start."""
    cards = (await client.get("/models")).json()["data"]
    assert [(card["id"], card["default"], card["loaded"], card["aliases"]) for card in cards] == [
        ("fake", True, True, []),
        ("small", False, False, ["org/small-model", "small-model"]),
        ("broken", False, False, ["org/broken"]),
    ]


async def test_a_model_is_chosen_by_any_of_its_names(client):
    """Its first user waits for it to load; the reply names the model and its fingerprint."""
    for name in ("small", "org/small-model", "small-model"):
        reply = (await client.post("/embed", json={"inputs": "red", "model": name})).json()
        assert (reply["model"], reply["fingerprint"]) == ("small", "org/small-model@1/256")
    assert await loaded(client) == {"fake": True, "small": True, "broken": False}
    reply = (await client.post("/embed", json={"inputs": "red"})).json()
    assert reply["model"] == "fake"


async def test_an_unknown_model_is_told_those_there_are(client):
    """404, natively, in /info, and in OpenAI's dialect."""
    for response in (
        await client.post("/embed", json={"inputs": "red", "model": "large"}),
        await client.get("/info", params={"model": "large"}),
        await client.post("/v1/embeddings", json={"input": "red", "model": "large"}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "model"
        assert "fake, small, broken" in response.json()["error"]["message"]


async def test_a_model_that_cannot_be_loaded(client):
    """503 that says why and when to try again; the others go on."""
    response = await client.post("/embed", json={"inputs": "red", "model": "broken"})
    assert response.status_code == 503
    assert "model.safetensors is missing" in response.json()["error"]["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 5
    assert (await client.post("/embed", json={"inputs": "red"})).status_code == 200
    assert (await client.get("/livez")).status_code == 200
    assert 'tercet_embedding_model_loads_total{result="failed"} 1.0' in (await client.get("/metrics")).text


async def test_info_describes_one_model(client):
    """Identity, what runs it, what it costs, its prompts and the limits; the default unless one is named."""
    about = (await client.get("/info")).json()
    assert (about["model"], about["device"], about["pooling"], about["dimensions"]) == ("fake", "cpu", "mean", [])
    assert about["limits"]["max_client_batch"] == 2048
    assert about["placement"]["devices"][0]["cost"]["ready"] is True
    other = (await client.get("/info", params={"model": "small"})).json()
    assert (other["model"], other["fingerprint"], other["weights_bytes"]) == ("small", "org/small-model@1/256", 1000)


async def test_memory_is_kept_within_its_bound():
    """With room for two models, the third takes the place of the one that was not used for longest."""
    settings = EmbeddingSettings(model="fake,b=org/b,c=org/c", model_memory_bytes=2500)
    async with serving(create_app(settings, load=load)) as client:
        for name in "bcb":
            assert (await client.post("/embed", json={"inputs": "red", "model": name})).status_code == 200
        assert await loaded(client) == {"fake": True, "b": True, "c": False}
        metrics = (await client.get("/metrics")).text
        assert 'tercet_embedding_model_evictions_total{reason="memory"} 2.0' in metrics
        assert "tercet_embedding_models_bytes 2000.0" in metrics


async def test_a_default_that_cannot_be_loaded_stops_the_start():
    """With one line that says which file is missing."""
    with pytest.raises(Unavailable, match=r"model\.safetensors is missing"):
        async with serving(create_app(EmbeddingSettings(model="broken=org/broken"), load=load)):
            pass


async def test_limits_are_settings():
    """Fewer inputs a request, and requests refused when too many are under way."""
    settings = EmbeddingSettings(model="fake", max_client_batch=2, max_concurrent_requests=1)

    def slow(_spec: ModelSpec, _settings: EmbeddingSettings) -> Sequence[Backend]:
        return [PricedBackend("cpu", batch_s=0.05, token_s=0)]

    async with serving(create_app(settings, load=slow)) as client:
        refused = await client.post("/embed", json={"inputs": ["a", "b", "c"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (413, "inputs")
        replies = await asyncio.gather(*(client.post("/embed", json={"inputs": f"text {n}"}) for n in range(4)))
        assert sorted(reply.status_code for reply in replies) == [200, 429, 429, 429]
        assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 429)
        assert (await client.post("/embed", json={"inputs": "a"})).status_code == 200


async def test_long_texts_are_refused_where_the_operator_says():
    """auto_truncate=false makes a text over the limit an error unless the request allows the cut."""
    async with serving(create_app(EmbeddingSettings(model="fake", auto_truncate=False))) as client:
        assert (await client.post("/embed", json={"inputs": "word " * 300})).status_code == 422
        assert (await client.post("/embed", json={"inputs": "word " * 300, "truncate": True})).status_code == 200


async def test_two_devices_are_described():
    """A model on two devices tells both, and from which size the second is the faster."""

    def both(_spec: ModelSpec, _settings: EmbeddingSettings) -> Sequence[Backend]:
        return [
            PricedBackend("cpu", batch_s=0.0002, token_s=0.0001),
            PricedBackend("cuda", batch_s=0.005, token_s=0.000001),
        ]

    async with serving(create_app(EmbeddingSettings(model="fake"), load=both)) as client:
        placement = (await client.get("/info")).json()["placement"]
        assert [site["device"] for site in placement["devices"]] == ["cpu", "cuda"]
        assert placement["crossover_tokens"] > 1
        assert (await client.post("/embed", json={"inputs": "red"})).status_code == 200


def test_specs_are_part_of_the_settings():
    """A specification that cannot be read is a settings error."""
    with pytest.raises(ValueError, match="precision"):
        EmbeddingSettings(model="fake;precision=fp8")
    assert replace(ModelSpec("a"), alias="b").public_name == "b"
