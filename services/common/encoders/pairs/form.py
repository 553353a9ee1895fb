"""How a model reads a query and a document side by side: what stands around and between their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.tokenizer import Ids, Offsets, TextTokenizer
from services.common.errors import InvalidInput
from services.common.model_errors import InvalidModel
from services.common.tokens import Tokens


class PairTokens(NamedTuple):
    """What a model reads at once: ids, special ones included, and the type of each token where the model has types."""

    tokens: Tokens
    types: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Fixed:
    """Tokens that are the same in every pair, and their types."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PairForm:
    """
    A pair is *before*, the query's tokens, *between*, the document's, *after*; a text alone *alone_before*, its tokens
    and *alone_after*. The latter are None for models that read pairs only.

    *query_lead* and *query_tail* are put around a query before it is tokenised, likewise *document_lead* and
    *document_tail*: the model's prompt, and white space, which tokenizers join to the words beside it. *types* are
    those of a query's and of a document's tokens; None for a model without types.
    """

    before: Fixed
    between: Fixed
    after: Fixed
    alone_before: Fixed | None = None
    alone_after: Fixed | None = None
    query_lead: str = ""
    query_tail: str = ""
    document_lead: str = ""
    document_tail: str = ""
    types: tuple[int, int] | None = None

    @property
    def fixed_tokens(self) -> int:
        """How many tokens of a pair are neither the query's nor the document's."""
        return len(self.before.ids) + len(self.between.ids) + len(self.after.ids)

    def to_values(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """
        Return what `to_values` wrote.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        fixed = {name: _fixed(values[name]) for name in ("before", "between", "after", "alone_before", "alone_after")}
        if fixed["before"] is None or fixed["between"] is None or fixed["after"] is None:
            raise ValueError("no form of pairs")
        types = values["types"]
        texts = {name: str(values[name]) for name in ("query_lead", "query_tail", "document_lead", "document_tail")}
        return cls(
            fixed["before"],
            fixed["between"],
            fixed["after"],
            fixed["alone_before"],
            fixed["alone_after"],
            **texts,
            types=None if types is None else (int(types[0]), int(types[1])),
        )


def _fixed(values: Mapping[str, Any] | None) -> Fixed | None:
    if values is None:
        return None
    ids, types = (tuple(int(one) for one in values[name]) for name in ("ids", "types"))
    if len(ids) != len(types):
        raise ValueError("no form of pairs")
    return Fixed(ids, types)


class PairTokenizer:
    """
    Tokenises queries and documents, each alone, and puts their tokens together in at most *max_tokens*; any thread.

    A document has a third of them at least, and a query half of them at most, or less where the form takes much.

    Raises:
        InvalidModel: The form leaves no room for a query in that many tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, form: PairForm, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self.max_tokens = max_tokens
        self._most_query = min(max_tokens // 2, max_tokens - form.fixed_tokens - -(-max_tokens // 3))
        (tail, _) = tokenizer.content([form.query_tail])[0]
        self._query_tail = tail
        if self._most_query <= len(tail):
            raise InvalidModel(
                f"max_tokens {max_tokens} is too little: {form.fixed_tokens} tokens of every pair are the model's own, "
                "and a document has a third"
            )

    def query(self, text: str) -> tuple[Ids, bool]:
        """Return a query's tokens, without special ones, and whether they were cut to their beginning."""
        form = self._form
        ids, _ = self._tokenizer.content([f"{form.query_lead}{text}{form.query_tail}"])[0]
        if len(ids) <= self._most_query:
            return ids, False
        kept = ids[: self._most_query - len(self._query_tail)]
        return np.concatenate([kept, self._query_tail]), True

    def documents(self, texts: Sequence[str]) -> list[tuple[Ids, Offsets | None]]:
        """Return whole documents' tokens and the characters that each covers; see TextTokenizer.content."""
        lead, tail = self._form.document_lead, self._form.document_tail
        if not lead and not tail:
            return self._tokenizer.content(texts)
        contents = self._tokenizer.content([f"{lead}{text}{tail}" for text in texts])
        return [
            (ids, None if offsets is None else np.clip(offsets - len(lead), 0, len(text)))
            for text, (ids, offsets) in zip(texts, contents, strict=True)
        ]

    def room(self, query: Ids) -> int:
        """Return how many tokens of a document fit beside *query*."""
        return self.max_tokens - self._form.fixed_tokens - len(query)

    def size(self, query_tokens: int, document_tokens: int | None) -> int:
        """
        Return how many tokens a pair of these sizes has, special ones included; None is no document.

        Raises:
            InvalidInput: The model reads pairs only, and there is no document.
        """
        if document_tokens is None:
            before, after = self._alone()
            return len(before.ids) + query_tokens + len(after.ids)
        return self._form.fixed_tokens + query_tokens + document_tokens

    def join(self, query: Ids, document: Ids | None) -> PairTokens:
        """
        Put a query's and a part of a document's tokens together; None is no document.

        Raises:
            InvalidInput: The model reads pairs only, and there is no document.
        """
        form = self._form
        if document is None:
            before, after = self._alone()
            ids = [*before.ids, *query.tolist(), *after.ids]
            if form.types is None:
                return PairTokens(Tokens(ids, False), None)
            return PairTokens(Tokens(ids, False), [*before.types, *[form.types[0]] * len(query), *after.types])
        ids = [*form.before.ids, *query.tolist(), *form.between.ids, *document.tolist(), *form.after.ids]
        if form.types is None:
            return PairTokens(Tokens(ids, False), None)
        of_query, of_document = form.types
        types = [
            *form.before.types,
            *[of_query] * len(query),
            *form.between.types,
            *[of_document] * len(document),
            *form.after.types,
        ]
        return PairTokens(Tokens(ids, False), types)

    def _alone(self) -> tuple[Fixed, Fixed]:
        before, after = self._form.alone_before, self._form.alone_after
        if before is None or after is None:
            raise InvalidInput("the model reads pairs of texts only: a second text is needed")
        return before, after


def padded_types(batch: Sequence[PairTokens], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the token types of *batch* as an array of *shape*; 0 where there is padding."""
    made = np.zeros(shape, dtype=np.int64)
    for row, item in enumerate(batch):
        assert item.types is not None
        made[row, : len(item.types)] = item.types
    return made
