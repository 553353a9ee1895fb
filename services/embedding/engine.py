"""A backend as the batcher sees it: inputs in, raw vectors out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.errors import BackendFailed, ContextTooLong, NotTokenizable, TercetError
from services.common.tokens import Tokens, TruncationDirection
from services.embedding.ports import Backend, CachedVector, Input

QUICK_CHARS = 512


@dataclass(slots=True)
class Work:
    """One input on its way: *field* and *index* say where the caller put it, *strict* that it may not be cut."""

    prompt: str
    input: Input
    size: int
    index: int
    field: str
    direction: TruncationDirection = "right"
    strict: bool = False
    per_token: bool = False

    @property
    def where(self) -> str:
        """The input's name in errors."""
        return f"{self.field}.{self.index}"


@dataclass(slots=True)
class Prepared:
    """One tokenised input."""

    tokens: Tokens
    work: Work


class FailedInput(BackendFailed):
    """The model raised on this input alone."""

    def __init__(self, work: Work) -> None:
        super().__init__(f"The model failed on {work.where}", param=work.where)
        self.work = work


def too_long(work: Work, max_tokens: int) -> ContextTooLong:
    """Return the error for an input over the limit that may not be cut."""
    return ContextTooLong(
        f"{work.where} is longer than the model's {max_tokens} tokens; shorten it or send truncate: true",
        param=work.where,
    )


class EmbeddingEngine:
    """See Engine. Token ids are taken as they are; a prompt goes before texts only."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._max_tokens = backend.info.max_tokens

    def prepare(self, items: Sequence[Work]) -> list[Prepared]:
        """See Engine. Raises ContextTooLong for an input over the limit that may not be cut."""
        if len(items) == 1 and isinstance(items[0].input, str):
            one = items[0]
            tokenized = self._backend.tokenize([one.prompt + items[0].input], direction=one.direction)
        else:
            tokenized = self._tokenize(items)
        for work, tokens in zip(items, tokenized, strict=True):
            if tokens.truncated and work.strict:
                raise too_long(work, self._max_tokens)
        return [Prepared(tokens, work) for work, tokens in zip(items, tokenized, strict=True)]

    def _tokenize(self, items: Sequence[Work]) -> list[Tokens]:
        done: list[Tokens | None] = [None] * len(items)
        texts: dict[TruncationDirection, list[tuple[int, str]]] = {}
        for position, work in enumerate(items):
            if isinstance(work.input, str):
                texts.setdefault(work.direction, []).append((position, work.prompt + work.input))
            else:
                done[position] = self._cut(work.input, work.direction)
        for direction, some in texts.items():
            tokenized = self._backend.tokenize([text for _, text in some], direction=direction)
            for (position, _), tokens in zip(some, tokenized, strict=True):
                done[position] = tokens
        return [tokens for tokens in done if tokens is not None]

    def _cut(self, ids: Sequence[int], direction: TruncationDirection) -> Tokens:
        if len(ids) <= self._max_tokens:
            return Tokens(ids, False)
        return Tokens(ids[: self._max_tokens] if direction == "right" else ids[-self._max_tokens :], True)

    def quick(self, items: Sequence[Work]) -> bool:
        """See Engine: one short text is."""
        return len(items) == 1 and items[0].size <= QUICK_CHARS

    def size(self, item: Work) -> int:
        """See Engine; token ids are cut, not tokenised."""
        return item.size if isinstance(item.input, str) else 0

    def tokens(self, prepared: Prepared) -> int:
        """See Engine."""
        return len(prepared.tokens.ids)

    def run(self, batch: Sequence[Prepared]) -> list[CachedVector]:
        """See Engine. A batch may hold both kinds of work: each kind is one pass through the model. Raises FailedInput."""
        whole = [one.tokens for one in batch if not one.work.per_token]
        pieces = [one.tokens for one in batch if one.work.per_token]
        try:
            pooled = iter(self._backend.forward(whole) if whole else ())
            each = iter(self._backend.token_vectors(pieces) if pieces else ())
        except Exception as error:
            if len(batch) > 1 or isinstance(error, TercetError | MemoryError):
                raise
            raise FailedInput(batch[0].work) from error
        return [_output(next(each if one.work.per_token else pooled), one.tokens) for one in batch]


def _output(vector: NDArray[np.float32], tokens: Tokens) -> CachedVector:
    return CachedVector(vector, len(tokens.ids), tokens.truncated)


def check_ids(ids: Sequence[int], vocabulary_size: int, where: str) -> None:
    """
    Do nothing if *ids* are token ids of the vocabulary, whose size 0 is not known.

    Raises:
        NotTokenizable: There are none, or one is outside; the message names *where*.
    """
    if not ids:
        raise NotTokenizable(f"{where} holds no token ids", param=where)
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or (vocabulary_size and highest >= vocabulary_size):
        wrong = lowest if lowest < 0 else highest
        raise NotTokenizable(
            f"{where} holds the token id {wrong}; the model's vocabulary is 0 to {vocabulary_size - 1}", param=where
        )
