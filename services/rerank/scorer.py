"""One scorer behind one batcher: texts to raw scores, a long document's by its best passage."""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.batching import Batcher, DeviceTurn, Lane
from services.common.errors import BackendFailed, DeadlineExceeded, Overloaded
from services.common.tracing import span
from services.rerank.ports import KEY_BYTES, Backend, DocumentTokens, QueryTokens, SharesVectors, Window
from services.rerank.score_cache import ScoreCache, ScoreKeys, found_within
from services.rerank.scores import RawScore, RawScores, ScoreOptions, SharedBytes, Timings
from services.rerank.tokenized import Chunk, TokenizedDocuments
from services.rerank.windows import windows

Row = NDArray[np.float32]

# Documents are given likeliest first; sorting by length within a short window keeps them roughly so.
SORT_WINDOW: Final = 32
# Where a known document costs a multiplication, what a batch costs beside it decides: all that one request has go at once.
SORT_WINDOW_OF_KNOWN: Final = 128
LOOK_UP_SHARE: Final = 0.5  # Of the time there is, at most so much is waited for what other processes know.
MOST_SHARED: Final = 128  # Documents' token vectors asked for at a time: some 6 MB.


@dataclass(frozen=True, slots=True)
class ScorerLimits:
    """How a scorer is set: see RerankSettings. *max_queue_items* counts documents."""

    max_batch_tokens: int
    max_queue_items: int
    tokenizer_threads: int
    hang_s: float
    tokenized_cache_bytes: int
    window_overlap_tokens: int
    max_windows: int


class _Engine:
    """A backend as the batcher sees it: windows in, rows of outputs out."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.tokens = backend.cost_tokens
        self.pads = not isinstance(backend, SharesVectors)  # Otherwise known vectors cost nothing beside new ones.

    def prepare(self, items: Sequence[Window]) -> Sequence[Window]:
        """See Engine: they were tokenised before."""
        return items

    def quick(self, items: Sequence[Window]) -> bool:
        """See Engine."""
        return True

    def run(self, batch: Sequence[Window]) -> list[Row]:
        """See Engine. Raises BackendFailed for what is not a number: the batcher finds out whose it is."""
        outputs = self._backend.score(batch)
        if not np.isfinite(outputs).all():
            raise BackendFailed("The model gave a score that is not a number")
        return list(outputs)


class Scorer:
    """
    A loaded *backend*. `start` it first, in the event loop that asks; `aclose` it at the end.

    *cache* knows scores of before; *vectors* takes and gives the token vectors of a backend that shares them. Scorers
    whose models share a device are given the same *turn*.
    """

    def __init__(
        self,
        backend: Backend,
        limits: ScorerLimits,
        *,
        cache: ScoreCache | None = None,
        vectors: SharedBytes | None = None,
        turn: DeviceTurn | None = None,
    ) -> None:
        self.info = backend.info
        self.backend = backend
        self._limits = limits
        self._cache = cache
        self._vectors = vectors
        self._shares = backend if isinstance(backend, SharesVectors) else None
        self._keys = ScoreKeys(f"{backend.info.fingerprint}/{limits.window_overlap_tokens}/{limits.max_windows}")
        self._documents = TokenizedDocuments(
            backend,
            limits.tokenized_cache_bytes,
            limits.tokenizer_threads,
            most_tokens=backend.info.max_tokens * limits.max_windows,
        )
        self._waiting = dict.fromkeys(Lane, 0)
        self.batcher: Batcher[Window, Row] = Batcher(
            _Engine(backend),
            max_batch_tokens=limits.max_batch_tokens,
            # What may wait is counted in documents, below.
            max_queue_items=limits.max_queue_items * limits.max_windows,
            sort_window=SORT_WINDOW if self._shares is None else SORT_WINDOW_OF_KNOWN,
            hang_s=limits.hang_s,
            turn=turn,
        )

    async def start(self) -> None:
        """Start the batcher and measure what batches cost (about a second, for a real model)."""
        await self.batcher.start()
        await self.batcher.calibrate(self._samples())
        if self._shares is not None:
            self._shares.fresh()  # Nobody needs the vectors of samples.

    async def aclose(self) -> None:
        """Finish what is queued, stop, and give the model's memory back."""
        self._documents.close()
        await self.batcher.aclose()
        if not self.batcher.problems():  # A thread that hangs in the model may still be using it.
            await asyncio.to_thread(self.backend.close)

    def problems(self) -> list[str]:
        """Return why this scorer cannot work any more; empty while it can."""
        return self.batcher.problems()

    def waiting(self, lane: Lane) -> int:
        """Return how many documents of *lane* were admitted and have no score yet."""
        return self._waiting[lane]

    async def raw(self, query: str, texts: Sequence[str], options: ScoreOptions) -> RawScores:
        """
        Score *texts* against *query*, the first ones first, sharing batches with concurrent callers.

        Equal pairs are scored once, in flight too; cancelling drops what is still queued.

        Raises:
            Overloaded: Too many documents wait; nothing was done.
            DeadlineExceeded: Time ran out (without *allow_partial*).
            BackendFailed, OutOfMemory, NotReady: As Batcher.submit.
        """
        started = time.monotonic()
        asked = await self._documents.query(query)
        keys = await self._documents.keys(texts)
        timings = Timings(tokenization_ms=_ms_since(started))
        score_keys = self._score_keys(query, keys, options)
        found = await self._known(score_keys, options)
        wanted = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if wanted:
            await self._score(asked, wanted, score_keys, found, options, timings)
        return RawScores([found.get(key) for key in keys], asked.cut, timings)

    async def classify(
        self, inputs: Sequence[tuple[str, str | None]], options: ScoreOptions
    ) -> tuple[list[tuple[Row, int]], Timings]:
        """
        Return the model's outputs for each text, or text and second text, in order, and the tokens that it read.

        What is over the model's limit is cut. A deadline that passes is an error. Raises: As `raw`.
        """
        self._admit(options.lane, len(inputs))
        try:
            started = time.monotonic()
            parts = await self._parts(inputs, options)
            timings = Timings(tokenization_ms=_ms_since(started))
            outputs = await self._submit(parts, options, timings)
        finally:
            self._waiting[options.lane] -= len(inputs)
        rows = [(row, self.backend.tokens(part)) for row, part in zip(outputs, parts, strict=True) if row is not None]
        return rows, timings

    # --- what is known

    def _score_keys(self, query: str, keys: Sequence[bytes], options: ScoreOptions) -> dict[bytes, bytes]:
        """Return the score cache's key for each text, by the text's."""
        if self._cache is None:
            return {}
        unique = list(dict.fromkeys(keys))
        reading = f"{options.long_documents}/{options.max_document_tokens or 0}"
        return dict(zip(unique, self._keys.of(query, reading, unique), strict=True))

    async def _known(self, score_keys: Mapping[bytes, bytes], options: ScoreOptions) -> dict[bytes, RawScore]:
        """Return the scores that the cache has, by the text's key."""
        if self._cache is None:
            return {}
        with span("cache.get") as lookup:
            found = await self._cache.get_many(list(score_keys.values()), _share_s(options))
            lookup.set({"tercet.cache.hits": len(found), "tercet.cache.misses": len(score_keys) - len(found)})
        return {key: found[score_key] for key, score_key in score_keys.items() if score_key in found}

    def _keep(self, score_keys: Mapping[bytes, bytes], scores: Mapping[bytes, RawScore]) -> None:
        if self._cache is not None:
            self._cache.put_many({score_keys[key]: score for key, score in scores.items() if score.complete})

    # --- what is not

    def _admit(self, lane: Lane, count: int) -> None:
        """Count *count* documents more, if they may wait."""
        if self._waiting[lane] + count > self._limits.max_queue_items:
            raise Overloaded(
                f"The {lane} queue is full ({self._limits.max_queue_items:,} documents); retry in a moment",
                retry_after_s=self.batcher.estimated_wait_s(lane),
            )
        self._waiting[lane] += count

    async def _score(
        self,
        query: QueryTokens,
        wanted: Mapping[bytes, str],
        score_keys: Mapping[bytes, bytes],
        found: dict[bytes, RawScore],
        options: ScoreOptions,
        timings: Timings,
    ) -> None:
        """Add to *found* the scores of the texts *wanted*: chunk after chunk, each tokenised while the one before is scored."""
        self._admit(options.lane, len(wanted))
        left = len(wanted)
        try:
            async with aclosing(self._documents.chunks(wanted, options.deadline)) as chunks:
                while True:
                    started = time.monotonic()
                    chunk = await anext(chunks, None)
                    timings.tokenization_ms += _ms_since(started)
                    if chunk is None:
                        break
                    scores = await self._score_chunk(query, chunk, options, timings)
                    self._keep(score_keys, scores)
                    found |= scores
                    left -= len(chunk)
                    self._waiting[options.lane] -= len(chunk)
        finally:
            self._waiting[options.lane] -= left
        if left and not options.allow_partial:
            raise DeadlineExceeded("The time allowed for this request ran out before its documents were tokenised")

    async def _score_chunk(
        self, query: QueryTokens, chunk: Chunk, options: ScoreOptions, timings: Timings
    ) -> dict[bytes, RawScore]:
        room = self.backend.room(query)
        most = 1 if options.long_documents == "first" else self._limits.max_windows
        parts: list[Window] = []
        ends: list[int] = []
        for document in chunk.values():
            length = min(len(document.ids), options.max_document_tokens or len(document.ids))
            for start, end in windows(length, room, overlap=self._limits.window_overlap_tokens, most=most):
                parts.append(Window(query, document, start, end))
            ends.append(len(parts))
        outputs = await self._submit(parts, options, timings)
        scores = {}
        first = 0
        for key, end in zip(chunk, ends, strict=True):
            score = self._best(parts[first:end], outputs[first:end])
            if score is not None:
                scores[key] = score
            first = end
        return scores

    def _best(self, parts: Sequence[Window], outputs: Sequence[Row | None]) -> RawScore | None:
        """Return the score of a document by those of its *parts* that have an output; None if none has."""
        scored = [
            (self.backend.relevance(row), part) for part, row in zip(parts, outputs, strict=True) if row is not None
        ]
        if not scored:
            return None
        raw, best = max(scored, key=lambda one: one[0])
        return RawScore(
            raw,
            tokens=sum(self.backend.tokens(part) for _, part in scored),
            passages=len(scored),
            best_passage=_characters(best),
            complete=len(scored) == len(parts),
        )

    async def _submit(self, parts: Sequence[Window], options: ScoreOptions, timings: Timings) -> list[Row | None]:
        """Return the outputs of *parts*, None where the deadline came first."""
        if self._shares is not None and self._vectors is not None:
            await self._fetch(self._shares, self._vectors, parts, options)
        done = await self.batcher.submit(
            parts,
            lane=options.lane,
            deadline=options.deadline,
            allow_partial=options.allow_partial,
            caller=options.caller,
            keys=[_work_key(part) for part in parts],
        )
        timings.add(Timings(done.tokenization_ms, done.queue_ms, done.inference_ms))
        if self._shares is not None and self._vectors is not None:
            self._vectors.put_later(dict(self._shares.fresh()))
        return done.outputs

    async def _fetch(
        self, backend: SharesVectors, vectors: SharedBytes, parts: Sequence[Window], options: ScoreOptions
    ) -> None:
        """Give *backend* the token vectors that other processes have made of *parts*."""
        lacking = backend.lacking(parts)[:MOST_SHARED]
        if not lacking:
            return
        values = await found_within(vectors, lacking, _share_s(options))
        for key, value in zip(lacking, values, strict=True):
            if value is not None:
                backend.take(key, value)

    async def _parts(self, inputs: Sequence[tuple[str, str | None]], options: ScoreOptions) -> list[Window]:
        """Return one window an input: a text alone, or a text beside the first part of the second."""
        # A text that stands alone is tokenised whole: as a query it would be cut at half of what the model reads.
        texts = [text if second is None else second for text, second in inputs]
        keys = await self._documents.keys(texts)
        tokens: Chunk = {}
        async with aclosing(self._documents.chunks(dict(zip(keys, texts, strict=True)), options.deadline)) as chunks:
            async for chunk in chunks:
                tokens |= chunk
        if len(tokens) < len(set(keys)):
            raise DeadlineExceeded("The time allowed for this request ran out before its texts were tokenised")
        parts = []
        for (text, second), key in zip(inputs, keys, strict=True):
            if second is None:
                parts.append(self._alone(tokens[key]))
            else:
                query = await self._documents.query(text)
                parts.append(Window(query, tokens[key], 0, min(len(tokens[key].ids), self.backend.room(query))))
        return parts

    def _alone(self, text: DocumentTokens) -> Window:
        """Return a window of *text* alone, cut to what the model reads."""
        room = self.backend.room(QueryTokens(b"", text.ids[:0], cut=False))
        return Window(QueryTokens(text.key, text.ids[:room], cut=len(text.ids) > room), None, 0, 0)

    def _samples(self) -> Callable[[int], Window]:
        """Return what makes windows of about so many tokens, each of a document that was never seen before."""
        query = self.backend.tokenize_query("word")
        room = self.backend.room(query)
        document = self.backend.tokenize(["word " * room])[0]

        def sample(tokens: int) -> Window:
            # No text has such a key, so nothing that is kept under it is ever used.
            return Window(query, document._replace(key=os.urandom(KEY_BYTES)), 0, min(len(document.ids), tokens, room))

        return sample


def _work_key(part: Window) -> tuple[bytes, bytes, int, int]:
    return part.query.key, b"" if part.document is None else part.document.key, part.start, part.end


def _characters(part: Window) -> tuple[int, int] | None:
    """Return where *part* is in its document's text."""
    document = part.document
    if document is None or document.offsets is None:
        return None
    if part.start == part.end:
        return 0, 0
    return int(document.offsets[part.start, 0]), int(document.offsets[part.end - 1, 1])


def _share_s(options: ScoreOptions) -> float | None:
    """Return how long others may be asked for what they know."""
    left_s = options.deadline.remaining_s()
    return None if left_s == inf else max(0.0, left_s) * LOOK_UP_SHARE


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1000


def problems_of(scorers: Iterable[Scorer]) -> list[str]:
    """Return why any of *scorers* cannot work any more, each under its name."""
    return [f"{one.info.name}: {problem}" for one in scorers for problem in one.problems()]
