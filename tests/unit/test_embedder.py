"""The use case: prompts, truncation, dimensions, token ids, the cache, and whose fault a failure is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE
from services.common.errors import (
    BackendFailed,
    ContextTooLong,
    EmptyInput,
    InvalidInput,
    NotTokenizable,
    OutOfMemory,
    TooLarge,
)
from services.embedding.cache import MemoryVectorCache
from services.embedding.embedder import Embedder, Embeddings, EmbedOptions
from services.embedding.placement import BatchLimits
from services.embedding.ports import Backend, Input
from tests.embedding_backends import SizedBackend, TroubledBackend

LIMITS = BatchLimits(
    max_batch_tokens=2048, max_batch_items=64, max_queue_items=4096, sort_window=64, tokenizer_threads=1, hang_s=30
)
LONG = "one " + "word " * 300 + "last"

Open = Callable[..., "asyncio.Future[Embedder]"]


@pytest.fixture
async def start() -> AsyncIterator[Open]:
    """Start embedders, closed at the end."""
    started: list[Embedder] = []

    async def start(backend: Backend, **options: object) -> Embedder:
        embedder = Embedder([backend], LIMITS, **options)  # type: ignore[arg-type]
        started.append(embedder)
        await embedder.start()
        return embedder

    yield start  # type: ignore[misc]
    for embedder in started:
        await embedder.aclose()


async def embed(embedder: Embedder, inputs: list[Input], **options: object) -> Embeddings:
    """Embed without haste."""
    return await embedder.embed(inputs, EmbedOptions(**options), lane=Lane.BULK, deadline=NO_DEADLINE)  # type: ignore[arg-type]


# --- prompts and lengths --------------------------------------------------------------------------------------------


async def test_a_prompt_goes_before_the_text(start):
    """A query's vector is that of the prompt and the text together, and the prompt's tokens count."""
    embedder = await start(SizedBackend(prompts={"query": "find ", "document": "this says "}))
    plain = await embed(embedder, ["find red", "this says red"])
    query = await embed(embedder, ["red"], input_type="query")
    document = await embed(embedder, ["red"], input_type="document")
    named = await embed(embedder, ["red"], prompt_name="query")
    assert np.array_equal(np.concatenate([query.vectors, document.vectors]), plain.vectors)
    assert np.array_equal(named.vectors, query.vectors)
    assert (query.tokens, document.tokens) == ([2], [3])


async def test_a_familys_prompts_are_part_of_the_fingerprint(start):
    """Vectors made with prompts that the files do not hold are told apart; a model's own prompts are in its files."""
    embedder = await start(SizedBackend(name="intfloat/e5-small"))
    assert embedder.info.fingerprint == "fake@1/256/e5"
    assert embedder.info.prompts == {"query": "query: ", "document": "passage: "}
    own = await start(SizedBackend(name="intfloat/e5-small", prompts={"query": "q "}))
    assert own.info.fingerprint == "fake@1/256"


async def test_either_end_of_a_long_text_may_be_cut(start):
    """`right` keeps the beginning and `left` the end; both are flagged."""
    embedder = await start(TroubledBackend())
    made = await embed(embedder, [LONG])
    left = await embed(embedder, [LONG], truncation_direction="left")
    beginning, end = await embed(embedder, ["one " + "word " * 255]), await embed(embedder, ["word " * 255 + "last"])
    assert np.array_equal(made.vectors, beginning.vectors)
    assert np.array_equal(left.vectors, end.vectors)
    assert (made.truncated, made.tokens, left.truncated) == ([True], [256], [True])


@pytest.mark.parametrize("cached", [False, True])
async def test_a_text_that_may_not_be_cut_is_refused_before_any_work(start, cached):
    """The error names the text, and the model has not been asked about it, whether or not the cache knows the text cut."""
    backend = TroubledBackend()
    embedder = await start(backend, cache=MemoryVectorCache(max_bytes=1 << 20, ttl_s=60))
    if cached:
        await embed(embedder, [LONG])
    backend.batches.clear()
    with pytest.raises(ContextTooLong, match=r"inputs\.1 is longer than the model's 256 tokens") as caught:
        await embed(embedder, ["short", LONG], truncate=False)
    assert caught.value.param == "inputs.1"
    assert backend.batches == []


async def test_two_callers_of_one_long_text(start):
    """Of two callers with the same text at once, only the one that forbids cutting it is refused."""
    embedder = await start(TroubledBackend())
    strict, lenient = await asyncio.gather(
        embed(embedder, [LONG], truncate=False), embed(embedder, [LONG]), return_exceptions=True
    )
    assert isinstance(strict, ContextTooLong)
    assert isinstance(lenient, Embeddings)


# --- shapes ---------------------------------------------------------------------------------------------------------


async def test_vectors_are_unit_length_unless_that_is_not_wanted(start):
    """Without `normalize` vectors are the model's own."""
    backend = TroubledBackend()
    embedder = await start(backend)
    made = await embed(embedder, ["red green", "blue"])
    assert np.linalg.norm(made.vectors, axis=1) == pytest.approx([1, 1], abs=1e-6)
    raw = await embed(embedder, ["red green", "blue"], normalize=False, dimensions=None)
    assert np.array_equal(raw.vectors, backend.forward(backend.tokenize(["red green", "blue"])))


async def test_declared_dimensions(start):
    """Vectors are cut to a size that the model declares, made unit length again, and told apart by their fingerprint."""
    embedder = await start(SizedBackend(dimensions=(16, 32)))
    whole = await embed(embedder, ["red green"])
    cut = await embed(embedder, ["red green"], dimensions=16)
    assert cut.vectors.shape == (1, 16)
    assert np.linalg.norm(cut.vectors) == pytest.approx(1, abs=1e-6)
    assert cut.vectors[0] @ whole.vectors[0, :16] == pytest.approx(np.linalg.norm(whole.vectors[0, :16]), abs=1e-6)
    assert (whole.fingerprint, cut.fingerprint) == ("fake@1/256", "fake@1/256/16d")
    assert (await embed(embedder, ["red green"], dimensions=64)).fingerprint == "fake@1/256"
    raw = await embed(embedder, ["red green"], dimensions=16, normalize=False)
    assert np.array_equal(raw.vectors, (await embed(embedder, ["red green"], normalize=False)).vectors[:, :16])


@pytest.mark.parametrize(
    ("declared", "any_size", "asked", "says"),
    [
        ((16, 32), False, 20, "these dimensions only: 16, 32"),
        ((), False, 16, "was not trained"),
        ((16,), False, 65, "from 1 to 64"),
        ((16,), True, 65, "from 1 to 64"),
        ((16,), True, 0, "from 1 to 64"),
    ],
)
async def test_other_dimensions_are_refused(start, declared, any_size, asked, says):
    """What the model was not trained for is refused, with what there is."""
    embedder = await start(SizedBackend(dimensions=declared), any_dimensions=any_size)
    with pytest.raises(InvalidInput, match=says) as caught:
        await embed(embedder, ["red"], dimensions=asked)
    assert caught.value.param == "dimensions"


async def test_any_dimensions_where_the_operator_allows(start):
    """The operator may allow any size."""
    embedder = await start(SizedBackend(), any_dimensions=True)
    assert (await embed(embedder, ["red"], dimensions=7)).vectors.shape == (1, 7)


async def test_token_vectors(start):
    """One vector a token, in order, in the same batches as whole texts."""
    embedder = await start(TroubledBackend())
    both = await asyncio.gather(
        embedder.embed_tokens(["red green", "blue"], lane=Lane.BULK, deadline=NO_DEADLINE), embed(embedder, ["red"])
    )
    rows, whole = both
    assert [each.shape for each in rows.vectors] == [(2, 64), (1, 64)]
    assert np.allclose(rows.vectors[0][0], whole.vectors[0])
    assert rows.tokens == [2, 1]


# --- token ids ------------------------------------------------------------------------------------------------------


async def test_token_ids_are_used_as_they_are(start):
    """Ids give the vector of the text they stand for, without a prompt, mixed with texts in one request."""
    backend = SizedBackend(prompts={"query": "find "})
    embedder = await start(backend)
    ids = tuple(backend.tokenize(["red green"])[0].ids)
    made = await embed(embedder, [ids, "red green"])
    assert np.array_equal(made.vectors[0], made.vectors[1])
    assert np.array_equal((await embed(embedder, [ids], input_type="query")).vectors[0], made.vectors[0])


async def test_too_many_token_ids(start):
    """They are cut on the side asked for, or refused."""
    backend = TroubledBackend()
    embedder = await start(backend)
    ids = tuple(range(300))
    right, left = await embed(embedder, [ids]), await embed(embedder, [ids], truncation_direction="left")
    assert np.array_equal(right.vectors, (await embed(embedder, [ids[:256]])).vectors)
    assert np.array_equal(left.vectors, (await embed(embedder, [ids[-256:]])).vectors)
    with pytest.raises(ContextTooLong) as caught:
        await embed(embedder, ["red", ids], truncate=False)
    assert caught.value.param == "inputs.1"


@pytest.mark.parametrize("ids", [(5, -1), (5, 100), ()])
async def test_ids_outside_the_vocabulary_are_refused(start, ids):
    """They are named, and no model sees them; decoding refuses them too."""
    embedder = await start(SizedBackend(vocabulary_size=100))
    with pytest.raises(NotTokenizable) as caught:
        await embed(embedder, [(1, 2), ids])
    assert caught.value.param == "inputs.1"
    with pytest.raises(NotTokenizable):
        await embedder.decode([ids])


async def test_tokens_and_back(start):
    """Tokenising tells which characters a token covers; decoding gives the words back."""
    embedder = await start(SizedBackend(prompts={"query": "find "}))
    (pieces,) = await embedder.tokenize(["Red, green"])
    assert [(piece.text, piece.start, piece.stop) for piece in pieces] == [("Red", 0, 3), ("green", 5, 10)]
    assert await embedder.decode([[piece.id for piece in pieces]]) == ["red green"]
    (with_prompt,) = await embedder.tokenize(["red"], prompt_name="query")
    assert [piece.text for piece in with_prompt] == ["find", "red"]


async def test_nothing_and_too_much(start):
    """No input is an error of its own; more inputs than allowed are refused under the caller's name for them."""
    embedder = await start(TroubledBackend(), max_inputs=2)
    with pytest.raises(EmptyInput):
        await embed(embedder, [])
    with pytest.raises(TooLarge, match="at most 2") as caught:
        await embedder.embed(["a"] * 3, lane=Lane.BULK, deadline=NO_DEADLINE, field="input")
    assert caught.value.param == "input"


# --- failures -------------------------------------------------------------------------------------------------------


async def test_the_input_that_the_model_cannot_bear_is_named(start):
    """One of four texts fails: the request fails and names it; others in the same batches do not."""
    embedder = await start(TroubledBackend())
    results = await asyncio.gather(
        embed(embedder, ["red", "green", "poison", "blue"]),
        embed(embedder, ["yellow", "white"]),
        embed(embedder, ["poison"]),
        return_exceptions=True,
    )
    assert isinstance(results[0], BackendFailed)
    assert results[0].param == "inputs.2"
    assert isinstance(results[1], Embeddings)
    # The same text was under way for somebody else, under another name.
    assert isinstance(results[2], BackendFailed)
    assert results[2].param == "inputs.0"


async def test_out_of_memory_is_told_apart(start):
    """A text for which the device has no room is not the model's failure."""
    embedder = await start(TroubledBackend())
    with pytest.raises(OutOfMemory):
        await embed(embedder, ["red", "huge"])


# --- the cache ------------------------------------------------------------------------------------------------------


async def test_what_is_known_is_not_computed(start):
    """A second request for a text takes it from the cache, in order among new ones, and says so; all known asks no model."""
    backend = TroubledBackend()
    embedder = await start(backend, cache=MemoryVectorCache(max_bytes=1 << 20, ttl_s=60))
    first = await embed(embedder, ["red green", "blue"])
    backend.batches.clear()
    second = await embed(embedder, ["white", "blue", "red green"])
    assert sum(backend.batches) == 1
    assert np.array_equal(second.vectors[1:], first.vectors[::-1])
    assert (first.cached_tokens, second.cached_tokens) == (0, 3)
    assert (second.tokens, second.truncated) == ([1, 1, 2], [False] * 3)
    backend.batches.clear()
    again = await embed(embedder, ["white", "blue"])
    assert (backend.batches, again.cached_tokens, again.inference_ms) == ([], 2, 0.0)


async def test_one_entry_serves_every_shape(start):
    """Normalised or not, cut or whole: the raw vector is kept, so that all share it."""
    backend = SizedBackend(dimensions=(16,))
    plain = await start(backend)
    cached = await start(backend, cache=MemoryVectorCache(max_bytes=1 << 20, ttl_s=60))
    await embed(cached, ["red"])
    for options in ({"normalize": False}, {"dimensions": 16}, {"dimensions": 16, "normalize": False}, {}):
        made = await embed(cached, ["red"], **options)
        assert made.cached_tokens == 1
        assert np.array_equal(made.vectors, (await embed(plain, ["red"], **options)).vectors)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (["red"], {"input_type": "query"}),
        (["red"], {"input_type": "document"}),
        (["red"], {"truncation_direction": "left"}),
        (["Red"], {}),
        ([(1, 2)], {}),
    ],
)
async def test_what_makes_another_vector_is_another_entry(start, inputs, options):
    """Prompt, cut side, the text's exact letters, and ids instead of a text are all part of the key."""
    backend = SizedBackend(prompts={"query": "q ", "document": "d "})
    embedder = await start(backend, cache=MemoryVectorCache(max_bytes=1 << 20, ttl_s=60))
    await embed(embedder, ["red"])
    await embed(embedder, ["1 2", "q red", "d red"])
    assert (await embed(embedder, inputs, **options)).cached_tokens == 0


async def test_models_do_not_share_entries(start):
    """Two models with one cache each get their own vectors."""
    cache = MemoryVectorCache(max_bytes=1 << 20, ttl_s=60)
    one = await start(SizedBackend(), cache=cache)
    other = await start(SizedBackend(fingerprint="other@1/256"), cache=cache)
    shorter = await start(SizedBackend(max_tokens=128), cache=cache)
    await embed(one, ["red"])
    for embedder in (other, shorter):
        assert (await embed(embedder, ["red"])).cached_tokens == 0
    assert replace(one.info, name="x").fingerprint == one.info.fingerprint


async def test_a_stampede_on_one_text_computes_it_once(start):
    """Many callers of one text at once cost the model one text, with a cold cache."""
    backend = TroubledBackend()
    embedder = await start(backend, cache=MemoryVectorCache(max_bytes=1 << 20, ttl_s=60))
    backend.batches.clear()
    made = await asyncio.gather(*(embed(embedder, ["red green"]) for _ in range(50)))
    assert sum(backend.batches) == 1
    assert all(np.array_equal(each.vectors, made[0].vectors) for each in made)


async def test_the_same_text_twice_in_a_request(start):
    """It is computed once and answered twice."""
    backend = TroubledBackend()
    embedder = await start(backend)
    backend.batches.clear()
    made = await embed(embedder, ["red", "blue", "red"])
    assert sum(backend.batches) == 2
    assert np.array_equal(made.vectors[0], made.vectors[2])
