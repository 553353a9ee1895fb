"""Documents as tokens: each text is tokenised once while it is kept, in threads, a chunk at a time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from typing import Final, TypeVar

from services.common.deadline import Deadline
from services.common.errors import BackendFailed, NotReady, TercetError
from services.rerank.kept import KeptByBytes
from services.rerank.ports import Backend, DocumentTokens, QueryTokens, text_key

CHUNK_ITEMS: Final = 128  # Documents that are tokenised, and then scored, at a time.
CHUNK_CHARS: Final = 65_536  # And so many characters: some 10 ms of tokenisation. A longer text goes alone.
QUICK_CHARS: Final = 512  # A query so short is tokenised in the event loop: a thread would take longer to be reached.
HASHED_IN_LOOP_CHARS: Final = 262_144
# A long text is tokenised this far for each token that is wanted of it, then further if that was not enough.
CHARS_A_TOKEN: Final = 16

T = TypeVar("T")
ItemT = TypeVar("ItemT")
Chunk = dict[bytes, DocumentTokens]


class TokenizedDocuments:
    """
    Documents as *backend*'s tokens, up to *max_bytes* of them kept by text hash, the least recently used going first.

    Of a long text at least the first *most_tokens* are there, which is all that is ever scored. Use it from one event
    loop; `close` it at the end.
    """

    def __init__(self, backend: Backend, max_bytes: int, threads: int, *, most_tokens: int) -> None:
        self._backend = backend
        self._most_tokens = most_tokens
        self._kept: KeptByBytes[DocumentTokens] = KeptByBytes(max_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._oversize = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-oversize")

    def close(self) -> None:
        """Take no more; chunks that wait for a thread are cancelled."""
        for pool in (self._pool, self._oversize):
            pool.shutdown(wait=False, cancel_futures=True)

    async def keys(self, texts: Sequence[str]) -> list[bytes]:
        """Return the `text_key` of each text."""
        if sum(map(len, texts)) <= HASHED_IN_LOOP_CHARS:
            return _keys(texts)
        return await self._start(self._pool, partial(_keys, texts))

    async def query(self, text: str) -> QueryTokens:
        """Return a query's tokens."""
        read = partial(_guarded, self._backend.tokenize_query, text)
        return read() if len(text) <= QUICK_CHARS else await self._start(self._pool, read)

    async def chunks(self, texts: Mapping[bytes, str], deadline: Deadline) -> AsyncGenerator[Chunk, None]:
        """
        Yield the tokens of *texts*, which are by their hash, chunk by chunk in their order; over-long texts come last.

        The next chunk is tokenised while the caller works with one. Nothing more comes once *deadline* has passed;
        close the iterator to stop earlier: what a thread has begun it ends, and nothing else is begun.

        Raises:
            BackendFailed: The tokenizer raised.
            NotReady: It is closed.
        """
        small = _plan({key: text for key, text in texts.items() if len(text) <= CHUNK_CHARS})
        plan = [*small, *({key: text} for key, text in texts.items() if len(text) > CHUNK_CHARS)]
        begun: dict[int, asyncio.Future[Chunk]] = {}
        try:
            for position in range(len(plan)):
                # One chunk ahead and one over-long text, not all: other requests take their turns in the threads between.
                for soon in {position, position + 1, max(position, len(small))}:
                    if soon < len(plan) and soon not in begun:
                        begun[soon] = asyncio.ensure_future(self._chunk(plan[soon]))
                chunk = await _by(begun[position], deadline)
                if chunk is None:
                    return
                yield chunk
        finally:
            for future in begun.values():
                if not future.cancel() and not future.cancelled():
                    future.exception()  # Seen, though nobody waits for it any more.

    async def _chunk(self, texts: Mapping[bytes, str]) -> Chunk:
        """Return the tokens of *texts*; what is not kept is tokenised in a thread."""
        found = {key: self._kept.get(key) for key in texts}
        lacking = {key: texts[key] for key, tokens in found.items() if tokens is None}
        if lacking:
            pool = self._oversize if any(len(text) > CHUNK_CHARS for text in lacking.values()) else self._pool
            made = await self._start(pool, partial(_guarded, self._tokenize, list(lacking.values())))
            for key, tokens in zip(lacking, made, strict=True):
                found[key] = tokens
                self._kept.put(key, tokens)
        return {key: tokens for key, tokens in found.items() if tokens is not None}

    def _tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """Tokenise each of *texts* as far as it may be read."""
        enough = self._most_tokens * CHARS_A_TOKEN
        made = self._backend.tokenize([text[:enough] for text in texts])
        if len(made) != len(texts):
            raise BackendFailed(f"The tokenizer gave {len(made)} results for {len(texts)} documents")
        for position, text in enumerate(texts):
            chars = enough
            while chars < len(text) and len(made[position].ids) <= self._most_tokens:
                chars *= 4
                made[position] = self._backend.tokenize([text[:chars]])[0]
        return made

    async def _start(self, pool: ThreadPoolExecutor, run: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(pool, run)
        except RuntimeError:
            raise NotReady("The service is stopping") from None
        return await future


def _guarded(tokenize: Callable[[ItemT], T], item: ItemT) -> T:
    """Tokenise *item*; what the tokenizer raises is the model's failure."""
    try:
        return tokenize(item)
    except TercetError:
        raise
    except Exception as error:
        raise BackendFailed(f"The tokenizer failed: {type(error).__name__}") from error


def _keys(texts: Sequence[str]) -> list[bytes]:
    return [text_key(text) for text in texts]


def _plan(texts: Mapping[bytes, str]) -> list[dict[bytes, str]]:
    """Divide *texts* into chunks."""
    plan: list[dict[bytes, str]] = []
    chars = 0
    for key, text in texts.items():
        chars += len(text)
        if not plan or len(plan[-1]) >= CHUNK_ITEMS or chars > CHUNK_CHARS:
            plan.append({})
            chars = len(text)
        plan[-1][key] = text
    return plan


async def _by(future: "asyncio.Future[Chunk]", deadline: Deadline) -> Chunk | None:
    """Return the result of *future*, None if it is not there at *deadline*."""
    left_s = deadline.remaining_s()
    if left_s <= 0:
        return None
    done, _ = await asyncio.wait([future], timeout=None if left_s == inf else left_s)
    return future.result() if done else None
