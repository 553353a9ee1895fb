"""The use case: texts to vectors through the shared batcher, the vector cache before it."""

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.batching import Lane, Submission
from services.common.deadline import Deadline
from services.common.errors import BackendFailed, EmptyInput, InvalidInput, TooLarge
from services.common.tokens import TokenPiece, TruncationDirection
from services.common.tracing import record_work, span
from services.embedding.engine import EmbeddingEngine, FailedInput, Work, check_ids, too_long
from services.embedding.placement import BatchLimits, Placement, TurnFor, Watch
from services.embedding.ports import Backend, CachedVector, Input, InputType, ModelInfo, VectorCache
from services.embedding.prompts import complete_prompts, prompt_for
from services.embedding.vector_keys import VectorKeys

__all__ = ["EmbedOptions", "Embedder", "Embeddings", "InputType", "TokenEmbeddings"]

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """
    How a caller wants its vectors.

    *input_type* applies the model's own prompt, *prompt_name* any of its prompts; one of them at most. *truncate*
    false makes a text over the model's limit an error. *dimensions* cuts the vectors (Matryoshka), None does not.
    """

    input_type: InputType | None = None
    prompt_name: str | None = None
    normalize: bool = True
    truncate: bool = True
    truncation_direction: TruncationDirection = "right"
    dimensions: int | None = None


@dataclass(slots=True)
class Embeddings:
    """
    Vectors, little-endian float32, shape [len(inputs), dim or the dimensions asked for], in the order of the inputs.

    *tokens* counts what the model reads of each input, *cached_tokens* those of inputs that the cache knew;
    *fingerprint* names what made the vectors, cut dimensions included.
    """

    vectors: Vectors
    tokens: list[int]
    truncated: list[bool]
    cached_tokens: int
    tokenization_ms: float
    queue_ms: float
    inference_ms: float
    characters: int
    fingerprint: str


@dataclass(slots=True)
class TokenEmbeddings:
    """One float32 array, shape [tokens, width], for each input in order; special tokens included."""

    vectors: list[Vectors]
    tokens: list[int]
    truncated: list[bool]
    tokenization_ms: float
    queue_ms: float
    inference_ms: float
    characters: int


class EmbedderObserver(Protocol):
    """Hears of replies and cache look-ups, for metrics."""

    def replied(self, tokens: int) -> None:
        """The model read so many tokens for a request."""
        ...

    def looked_up(self, hits: int, misses: int) -> None:
        """The cache was asked for so many inputs."""
        ...


class Embedder:
    """
    One loaded model, on one device or on several that share its fingerprint. `start` it first, `aclose` it at the end.

    *name* is what callers know it by; *any_dimensions* lets vectors be cut to any size, declared by the model or not;
    *max_inputs* is the most that one request may hold; *observer* hears of requests, *watch* gets each batcher.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        limits: BatchLimits,
        *,
        name: str | None = None,
        cache: VectorCache | None = None,
        any_dimensions: bool = False,
        max_inputs: int = 2048,
        turn_for: TurnFor | None = None,
        observer: EmbedderObserver | None = None,
        watch: Watch | None = None,
    ) -> None:
        info = backends[0].info
        prompts, family = complete_prompts(info.prompts, info.name)
        fingerprint = f"{info.fingerprint}/{family}" if family else info.fingerprint
        self.info: ModelInfo = replace(info, name=name or info.name, prompts=prompts, fingerprint=fingerprint)
        self.any_dimensions = any_dimensions
        self.backend = backends[0]
        self.placement = Placement(backends, [EmbeddingEngine(one) for one in backends], limits, turn_for, watch)
        self.batcher = self.placement.sites[0].batcher
        self._cache = cache
        if cache is not None:
            for site in self.placement.sites:
                site.batcher.keep = self._keep
        self._max_inputs = max_inputs
        self._observer = observer
        self._keys = VectorKeys(info.fingerprint, info.max_tokens)

    async def start(self) -> None:
        """Start the batchers and measure what batches cost (seconds, for a real model)."""
        await self.placement.start()

    async def aclose(self) -> None:
        """Finish what is queued, stop, and give the model's memory back."""
        await self.placement.aclose()

    def problems(self) -> list[str]:
        """Return why this model cannot work any more; empty while it can."""
        return self.placement.problems()

    async def embed(
        self,
        inputs: Sequence[Input],
        options: EmbedOptions = EmbedOptions(),
        *,
        lane: Lane,
        deadline: Deadline,
        caller: str = "",
        field: str = "inputs",
    ) -> Embeddings:
        """
        Embed *inputs*, sharing batches with concurrent callers; cancelling drops what is still queued.

        Identical inputs in flight are computed once. Errors name the input at fault as `field.index`.

        Raises:
            InvalidInput: The options contradict each other or the model, or token ids are not in its vocabulary.
            ContextTooLong: An input is over the model's limit and may not be cut.
            Overloaded, DeadlineExceeded, BackendFailed, NotReady: As Batcher.submit.
        """
        self._check_dimensions(options.dimensions)
        work = self._work(inputs, options, field, per_token=False)
        made = await self._compute(work, lane, deadline, caller)
        outputs = made.outputs
        vectors = np.stack([output.vector for output in outputs])
        cut = options.dimensions is not None and options.dimensions != self.info.dim
        if cut:
            vectors = vectors[:, : options.dimensions]
        if options.normalize:
            vectors = vectors / np.maximum(np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None], 1e-12)
        return Embeddings(
            vectors=np.ascontiguousarray(vectors, dtype="<f4"),
            tokens=[output.tokens for output in outputs],
            truncated=[output.truncated for output in outputs],
            cached_tokens=made.cached_tokens,
            tokenization_ms=made.tokenization_ms,
            queue_ms=made.queue_ms,
            inference_ms=made.inference_ms,
            characters=sum(one.size for one in work),
            fingerprint=f"{self.info.fingerprint}/{options.dimensions}d" if cut else self.info.fingerprint,
        )

    async def embed_tokens(
        self,
        inputs: Sequence[Input],
        options: EmbedOptions = EmbedOptions(),
        *,
        lane: Lane,
        deadline: Deadline,
        caller: str = "",
        field: str = "inputs",
    ) -> TokenEmbeddings:
        """
        Return every token's vector for each of *inputs*, in their order; `normalize` and `dimensions` do not apply.

        They are not cached. Raises: As `embed`.
        """
        work = self._work(inputs, options, field, per_token=True)
        made = await self._compute(work, lane, deadline, caller)
        return TokenEmbeddings(
            vectors=[output.vector for output in made.outputs],
            tokens=[output.tokens for output in made.outputs],
            truncated=[output.truncated for output in made.outputs],
            tokenization_ms=made.tokenization_ms,
            queue_ms=made.queue_ms,
            inference_ms=made.inference_ms,
            characters=sum(one.size for one in work),
        )

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prompt_name: str | None = None
    ) -> list[list[TokenPiece]]:
        """Return every token of each text, uncut, the prompt *prompt_name* before it. Raises InvalidInput."""
        prompt = self._prompt(None, prompt_name)

        def run() -> list[list[TokenPiece]]:
            return [self.backend.pieces(prompt + text, add_special_tokens=add_special_tokens) for text in texts]

        return await asyncio.to_thread(run)

    async def decode(
        self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = True, field: str = "ids"
    ) -> list[str]:
        """Return the text of each sequence of token ids. Raises InvalidInput for ids that the vocabulary lacks."""

        def run() -> list[str]:
            for index, ids in enumerate(sequences):
                check_ids(ids, self.info.vocabulary_size, f"{field}.{index}")
            return [self.backend.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

        return await asyncio.to_thread(run)

    def _keep(self, key: Hashable, output: CachedVector) -> None:
        if self._cache is not None and isinstance(key, bytes) and output.vector.ndim == 1:
            self._cache.keep(key, output)

    def _prompt(self, input_type: InputType | None, prompt_name: str | None) -> str:
        default = self.info.default_prompt
        return prompt_for(self.info.prompts, input_type=input_type, prompt_name=prompt_name, default=default)

    def _work(self, inputs: Sequence[Input], options: EmbedOptions, field: str, *, per_token: bool) -> list[Work]:
        if not inputs:
            raise EmptyInput(f"{field} holds nothing to embed", param=field)
        if len(inputs) > self._max_inputs:
            raise TooLarge(f"{field} holds {len(inputs):,} inputs; send at most {self._max_inputs:,}", param=field)
        prompt = self._prompt(options.input_type, options.prompt_name)
        strict, direction = not options.truncate, options.truncation_direction
        work = [
            Work(prompt, one, len(one), index, field, direction, strict, per_token) for index, one in enumerate(inputs)
        ]
        for one in work:
            if not isinstance(one.input, str):
                check_ids(one.input, self.info.vocabulary_size, one.where)
        return work

    def _check_dimensions(self, dimensions: int | None) -> None:
        """Raise InvalidInput where vectors may not be cut to *dimensions*."""
        info = self.info
        if dimensions is None or dimensions == info.dim:
            return
        if not 1 <= dimensions < info.dim:
            raise InvalidInput(
                f"dimensions must be from 1 to {info.dim}, the model's own, not {dimensions}", param="dimensions"
            )
        if self.any_dimensions or dimensions in info.dimensions:
            return
        sizes = ", ".join(str(size) for size in info.dimensions)
        raise InvalidInput(
            f"{info.name} may be cut to these dimensions only: {sizes}"
            if sizes
            else f"{info.name} was not trained to be cut to fewer than its {info.dim} dimensions (its operator may allow "
            "it with dimensions=any)",
            param="dimensions",
        )

    async def _compute(self, work: Sequence[Work], lane: Lane, deadline: Deadline, caller: str) -> "_Computed":
        """Return one output an input, from the cache or from the model, which is left alone when the cache knows all."""
        keys = self._keys.of(work)
        if self._cache is None or work[0].per_token:
            done = await self._submit(work, keys, lane, deadline, caller)
            return self._computed(done.outputs, 0, done)
        with span("cache.get") as lookup:
            hits, dim = await self._cache.get_many(keys), self.info.dim
            found = [hit if hit and len(hit.vector) == dim else None for hit in hits]
            missing = [index for index, hit in enumerate(found) if hit is None]
            lookup.set({"tercet.cache.hits": len(work) - len(missing), "tercet.cache.misses": len(missing)})
        if self._observer is not None:
            self._observer.looked_up(len(work) - len(missing), len(missing))
        _refuse_cut(work, found, self.info.max_tokens)
        if len(missing) == len(work):
            done = await self._submit(work, keys, lane, deadline, caller)
            await self._cache.put_many(_known(zip(keys, done.outputs, strict=True)))
            return self._computed(done.outputs, 0, done)
        cached_tokens = sum(hit.tokens for hit in found if hit is not None)
        if not missing:
            return self._computed(found, cached_tokens, None)
        some = [keys[index] for index in missing]
        done = await self._submit([work[index] for index in missing], some, lane, deadline, caller)
        await self._cache.put_many(_known(zip(some, done.outputs, strict=True)))
        for index, output in zip(missing, done.outputs, strict=True):
            found[index] = output
        return self._computed(found, cached_tokens, done)

    def _computed(
        self, outputs: Sequence[CachedVector | None], cached_tokens: int, done: Submission[CachedVector] | None
    ) -> "_Computed":
        every = [output for output in outputs if output is not None]
        if done is None:
            return _Computed(every, cached_tokens)
        if self._observer is not None:
            self._observer.replied(sum(output.tokens for output in every) - cached_tokens)
        return _Computed(every, cached_tokens, done.tokenization_ms, done.queue_ms, done.inference_ms)

    async def _submit(
        self, work: Sequence[Work], keys: Sequence[Hashable], lane: Lane, deadline: Deadline, caller: str
    ) -> Submission[CachedVector]:
        batcher = self.placement.choose(work, lane)
        try:
            # An input that may not be cut fails under its own name, so it is not shared with others.
            done = await batcher.submit(
                work, lane=lane, deadline=deadline, caller=caller, keys=None if work[0].strict else keys
            )
        except FailedInput as error:
            # The same input may have been somebody else's first, under another name.
            where = next((one.where for one in work if one.input == error.work.input), error.work.where)
            raise BackendFailed(f"The model failed on {where}", param=where) from error
        record_work(done)
        return done


@dataclass(slots=True)
class _Computed:
    outputs: list[CachedVector]
    cached_tokens: int
    tokenization_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0


def _refuse_cut(work: Sequence[Work], found: Sequence[CachedVector | None], max_tokens: int) -> None:
    """Raise ContextTooLong where the cache knows of an input that it was cut, and it may not be."""
    if work[0].strict:
        for one, hit in zip(work, found, strict=True):
            if hit is not None and hit.truncated:
                raise too_long(one, max_tokens)


def _known(pairs: Iterable[tuple[bytes, CachedVector | None]]) -> dict[bytes, CachedVector]:
    return {key: output for key, output in pairs if output is not None}
