"""Documents as tokens: kept, in chunks, and never longer than somebody waits."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, NotReady
from services.rerank.ports import DocumentTokens
from services.rerank.tokenized import CHUNK_CHARS, CHUNK_ITEMS, QUICK_CHARS, TokenizedDocuments
from tests.batching_engine import until
from tests.rerank_backends import PATIENCE_S, TroubledScorer

Open = Callable[..., TokenizedDocuments]


class WaitingScorer(TroubledScorer):
    """Its tokenizer waits for *gate* with texts that begin with `wait`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waits = threading.Event()

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """See Backend."""
        if any(text.startswith("wait") for text in texts):
            self.waits.set()
            assert self.gate.wait(PATIENCE_S)
        return super().tokenize(texts)


@pytest.fixture
def backend() -> WaitingScorer:
    """A scorer with a gate before its tokenizer."""
    return WaitingScorer()


@pytest.fixture
async def start(backend) -> AsyncIterator[Open]:
    """Make stores of tokens, closed at the end."""
    made: list[TokenizedDocuments] = []

    def start(max_bytes: int = 1 << 20, most_tokens: int = 4096) -> TokenizedDocuments:
        made.append(TokenizedDocuments(backend, max_bytes, 1, most_tokens=most_tokens))
        return made[-1]

    yield start
    backend.gate.set()
    for one in made:
        one.close()


async def read(
    documents: TokenizedDocuments, texts: Sequence[str], deadline: Deadline = NO_DEADLINE
) -> list[list[str]]:
    """Return the texts of each chunk that came."""
    keys = await documents.keys(texts)
    by_key = dict(zip(keys, texts, strict=True))
    found = []
    async with aclosing(documents.chunks(by_key, deadline)) as chunks:
        async for chunk in chunks:
            assert all(len(tokens.ids) == len(by_key[key].split()) for key, tokens in chunk.items())
            found.append([by_key[key] for key in chunk])
    return found


async def test_each_text_is_tokenised_once(start, backend):
    """While it is kept; the order stays whatever is known."""
    documents = start()
    assert await read(documents, ["red", "green blue"]) == [["red", "green blue"]]
    assert await read(documents, ["white", "red", "black", "green blue"]) == [["white", "red", "black", "green blue"]]
    assert backend.tokenized == [["red", "green blue"], ["white", "black"]]


async def test_the_bound_holds(start, backend):
    """What was used least recently is tokenised again."""
    size = backend.tokenize(["red"])[0].nbytes
    backend.tokenized.clear()
    documents = start(max_bytes=2 * size)
    for text in ("red", "green", "red", "blue", "red", "green"):
        await read(documents, [text])
    assert [text for (text,) in backend.tokenized] == ["red", "green", "blue", "green"]


async def test_chunks_are_bounded(start, backend):
    """By how many documents they hold, and by their characters."""
    many = await read(start(), [f"text {number}" for number in range(2 * CHUNK_ITEMS + 1)])
    assert [len(chunk) for chunk in many] == [CHUNK_ITEMS, CHUNK_ITEMS, 1]
    third = CHUNK_CHARS // 3
    long = [f"{number} " + "x" * third for number in range(5)]
    assert [len(chunk) for chunk in await read(start(), long)] == [2, 2, 1]


async def test_one_chunk_is_tokenised_ahead(start, backend):
    """While the caller works with a chunk the next one is made ready, and no more."""
    texts = {b"%d" % number: f"text {number}" for number in range(4 * CHUNK_ITEMS)}
    async with aclosing(start().chunks(texts, NO_DEADLINE)) as chunks:
        await anext(chunks)
        await until(lambda: len(backend.tokenized) == 2)
        await anext(chunks)
        await until(lambda: len(backend.tokenized) == 3)
    assert len(backend.tokenized) == 3


async def test_an_over_long_text_holds_up_nobody(start, backend):
    """It is tokenised beside the others, and comes last; another request's texts do not wait for it."""
    long = "wait" + " word" * CHUNK_CHARS
    documents = start(most_tokens=1 << 20)
    first = asyncio.create_task(read(documents, [long, "red"]))
    await asyncio.to_thread(backend.waits.wait, PATIENCE_S)
    assert await read(documents, ["green"]) == [["green"]]
    backend.gate.set()
    assert await first == [["red"], [long]]


async def test_as_much_as_is_wanted_of_a_long_text(start, backend):
    """At least so many tokens as may be scored, even where they are far apart; never much of the rest."""
    documents = start(most_tokens=10)
    dense, sparse, empty = "a " * 50_000, ("a" + " " * 400) * 100, " " * 60_000
    async with aclosing(documents.chunks({b"d": dense, b"s": sparse, b"e": empty}, NO_DEADLINE)) as chunks:
        found = {key: len(tokens.ids) async for chunk in chunks for key, tokens in chunk.items()}
    assert 10 <= found[b"d"] < 1000
    assert 10 <= found[b"s"] <= 100
    assert found[b"e"] == 0


async def test_the_deadline_ends_it(start, backend):
    """What is ready by then is there; nothing more is waited for, and nothing begun after it."""
    texts = [f"text {number}" for number in range(CHUNK_ITEMS)] + ["wait"] + [f"more {n}" for n in range(CHUNK_ITEMS)]
    assert len(await read(start(), texts, Deadline.after(0.05))) == 1
    assert await read(start(), ["red"], Deadline.after(-1)) == []


async def test_whoever_goes_away_is_worked_for_no_longer(start, backend):
    """The chunk that a thread has is ended, those after it are not begun."""
    documents = start()
    task = asyncio.create_task(read(documents, ["wait", *(f"text {number}" for number in range(3 * CHUNK_ITEMS))]))
    await asyncio.to_thread(backend.waits.wait, PATIENCE_S)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    backend.gate.set()
    assert await read(documents, ["red"]) == [["red"]]
    assert len(backend.tokenized) == 2


async def test_a_tokenizer_that_raises(start):
    """It is the model's failure, told without the text."""
    with pytest.raises(BackendFailed) as caught:
        await read(start(), ["red", "untokenizable"])
    assert "cannot" not in caught.value.message


async def test_after_the_end(start):
    """Nothing is tokenised any more."""
    documents = start()
    documents.close()
    with pytest.raises(NotReady):
        await read(documents, ["red"])


async def test_queries_and_keys_of_any_length(start):
    """Long ones are worked on in a thread, with the same result."""
    documents = start()
    assert [len((await documents.query("word " * count)).ids) for count in (2, QUICK_CHARS)] == [2, 128]
    short, long = await documents.keys(["red", "word " * 100_000])
    assert (await documents.keys(["word " * 100_000])) == [long]
    assert (await documents.keys(["red"])) == [short]
