"""The use case: texts to vectors through the shared batcher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.common.batching import Batcher, Lane
from services.common.deadline import Deadline
from services.common.errors import InvalidInput, NotFound
from services.common.tokens import Tokens
from services.embedding.ports import Backend, ModelInfo

InputType = Literal["query", "document"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors, float32, shape [len(texts), dim], in the order of the texts, with what each text cost."""

    vectors: NDArray[np.float32]
    tokens: list[int]
    truncated: list[bool]
    tokenization_ms: float
    queue_ms: float
    inference_ms: float


class _EmbeddingEngine:
    """A backend as the batcher sees it; an output is the vector with the tokens it was made from."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def prepare(self, items: Sequence[str]) -> list[Tokens]:
        return self._backend.tokenize(items)

    def tokens(self, prepared: Tokens) -> int:
        return len(prepared.ids)

    def run(self, batch: Sequence[Tokens]) -> list[tuple[NDArray[np.float32], Tokens]]:
        return list(zip(self._backend.forward(batch), batch, strict=True))


class Embedder:
    """One model behind one batcher."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_batch_tokens: int,
        max_queue_items: int,
        tokenizer_threads: int,
        hang_s: float,
    ) -> None:
        self.info: ModelInfo = backend.info
        self.batcher: Batcher[str, tuple[NDArray[np.float32], Tokens]] = Batcher(
            _EmbeddingEngine(backend),
            max_batch_tokens=max_batch_tokens,
            max_queue_items=max_queue_items,
            tokenizer_threads=tokenizer_threads,
            hang_s=hang_s,
        )

    def check_model(self, name: str | None) -> None:
        """Do nothing if *name* is this model's, or None. Raises NotFound with the names there are."""
        if name is not None and name not in (self.info.name, self.info.name.rsplit("/", 1)[-1]):
            raise NotFound(f"There is no model {name[:100]!r}; there is: {self.info.name}", param="model")

    async def embed(
        self,
        texts: Sequence[str],
        *,
        lane: Lane,
        deadline: Deadline,
        input_type: InputType | None = None,
        normalize: bool = True,
        truncate: bool = True,
    ) -> Embeddings:
        """
        Embed *texts*, sharing batches with concurrent callers; cancelling drops what is still queued.

        *input_type* puts the model's own prompt before each text.

        Raises:
            InvalidInput: A text is over the model's limit and *truncate* is false; the message names its index.
            Overloaded, DeadlineExceeded, BackendFailed, NotReady: As Batcher.submit.
        """
        prompt = self.info.prompts.get(input_type, "") if input_type else ""
        done = await self.batcher.submit([prompt + text for text in texts], lane=lane, deadline=deadline)
        outputs = [output for output in done.outputs if output is not None]
        for index, (_, tokenized) in enumerate(outputs):
            if tokenized.truncated and not truncate:
                raise InvalidInput(
                    f"inputs.{index} is longer than the model's {self.info.max_tokens} tokens; shorten it or send truncate: true",
                    param=f"inputs.{index}",
                )
        vectors = np.stack([vector for vector, _ in outputs])
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(
            vectors=np.ascontiguousarray(vectors, dtype="<f4"),
            tokens=[len(tokenized.ids) for _, tokenized in outputs],
            truncated=[tokenized.truncated for _, tokenized in outputs],
            tokenization_ms=done.tokenization_ms,
            queue_ms=done.queue_ms,
            inference_ms=done.inference_ms,
        )
