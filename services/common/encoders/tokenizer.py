"""Text to token ids, by the `tokenizers` library alone where it says the same as the model's own tokenizer."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from services.common.tokens import TokenPiece, Tokens, TruncationDirection

# A text longer than this a token is not tokenised whole to keep its beginning or end.
_CHARS_A_TOKEN = 24
# Tokens beside a cut that may differ from the whole text's, and are never used.
_CUT_MARGIN_TOKENS = 64

Ids = NDArray[np.int32]
Offsets = NDArray[np.int32]


class TextTokenizer:
    """
    A model's tokenizer. Every method may be called from any thread.

    *before* and *after* are the ids of the special tokens that the model has around every text.

    The library keeps how it truncates as state that threads would share, so texts are tokenised uncut here and the
    ids are cut: the special tokens at both ends stay.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer: Any = tokenizer
        self.max_tokens = max_tokens
        sample = tokenizer.encode("a")
        added = sample.special_tokens_mask
        first = added.index(0) if 0 in added else len(added)
        self.before: list[int] = sample.ids[:first]
        self.after: list[int] = sample.ids[first + added.count(0) :]

    @classmethod
    def from_json(cls, text: str, *, max_tokens: int) -> "TextTokenizer":
        """
        Read the contents of a `tokenizer.json`.

        Raises:
            ValueError: It is none.
        """
        try:
            return cls(Tokenizer.from_str(text), max_tokens=max_tokens)
        except ValueError:
            raise
        except Exception as error:  # The library raises bare Exceptions.
            raise ValueError(f"no tokenizer: {error}") from error

    def tokenize(
        self, texts: Sequence[str], max_tokens: int | None = None, direction: TruncationDirection = "right"
    ) -> list[Tokens]:
        """Tokenise *texts* in order, each cut to the model's limit, or to *max_tokens* if that is less."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        whole_chars = limit * _CHARS_A_TOKEN
        whole = [text for text in texts if len(text) <= whole_chars]
        encoded = iter(self._encode(whole))
        return [
            self._cut(next(encoded), limit, direction)
            if len(text) <= whole_chars
            else self._cut_long(text, limit, direction)
            for text in texts
        ]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0]).ids]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _cut(self, ids: list[int], limit: int, direction: TruncationDirection) -> Tokens:
        if len(ids) <= limit:
            return Tokens(ids, False)
        before, after = ids[: len(self.before)], ids[len(ids) - len(self.after) :]
        content = ids[len(self.before) : len(ids) - len(self.after)]
        room = max(0, limit - len(before) - len(after))
        kept = content[:room] if direction == "right" else content[len(content) - room :]
        return Tokens([*before, *kept, *after][:limit], True)

    def _cut_long(self, text: str, limit: int, direction: TruncationDirection) -> Tokens:
        """
        Tokenise only as much of a very long *text* as gives *limit* tokens.

        The part ends where white space does, and has to give more tokens than are used, for those next to where it
        was cut might be others in the whole text.
        """
        chars = limit * _CHARS_A_TOKEN
        while chars * 2 < len(text):
            part = _beginning(text, chars) if direction == "right" else _end(text, chars)
            if part:
                (ids,) = self._encode([part])
                if len(ids) > limit + _CUT_MARGIN_TOKENS:
                    return self._cut(ids, limit, direction)
            chars *= 4
        return self._cut(self._encode([text])[0], limit, direction)

    def content(self, texts: Sequence[str]) -> list[tuple[Ids, Offsets | None]]:
        """
        Tokenise whole *texts* in order, uncut and without the special tokens around them.

        Beside its ids, shape [tokens], each has the characters that its tokens cover, shape [tokens, 2]: first and
        one after the last. They are None where the tokenizer does not know.
        """
        if len(texts) == 1:
            encodings = [self._tokenizer.encode(texts[0], add_special_tokens=False)]
        else:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(one.ids, dtype=np.int32), np.array(one.offsets, dtype=np.int32).reshape(-1, 2))
            for one in encodings
        ]

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[TokenPiece]:
        """Return every token of *text*, uncut; a piece's text is the part of *text* that it covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        rows = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [
            TokenPiece(id_, token, True, None, None) if added else TokenPiece(id_, text[start:stop], False, start, stop)
            for id_, token, (start, stop), added in rows
        ]

    def punctuation(self) -> NDArray[np.int32]:
        """Return the ids of tokens that are a punctuation mark of ASCII: alone, after a word, or after a space."""
        found = set()
        for mark in string.punctuation:
            for ids, _ in self.content([mark, f"a{mark}", f"a {mark}"]):
                last = ids[-1:].tolist()
                if self.decode(last).strip() == mark:
                    found.update(last)
        return np.array(sorted(found), dtype=np.int32)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text that *ids* stand for; ids that the vocabulary lacks stand for nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


class PythonTokenizer(TextTokenizer):
    """
    A tokenizer that exists in Python only (ByT5, custom code), through transformers.

    Its pieces have no character offsets: it knows none.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int) -> None:
        self._slow = tokenizer
        self.max_tokens = max_tokens
        bare, whole = self._ids("a", False), self._ids("a", True)
        starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
        first = next(starts, 0)
        self.before = whole[:first]
        self.after = whole[first + len(bare) :]

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._slow(text, add_special_tokens=add_special_tokens, truncation=False)["input_ids"]
        return ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ids(text, True) for text in texts]

    def content(self, texts: Sequence[str]) -> list[tuple[Ids, Offsets | None]]:
        """See TextTokenizer; the offsets are None."""
        return [(np.array(self._ids(text, False), dtype=np.int32), None) for text in texts]

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[TokenPiece]:
        """See TextTokenizer."""
        ids = self._ids(text, add_special_tokens)
        special = set(self._slow.all_special_ids)
        tokens = self._slow.convert_ids_to_tokens(ids)
        return [TokenPiece(id_, token, id_ in special, None, None) for id_, token in zip(ids, tokens, strict=True)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See TextTokenizer."""
        text: str = self._slow.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def make_tokenizer(
    model_tokenizer: Any, *, max_tokens: int, samples: Sequence[str]
) -> tuple[TextTokenizer, str | None]:
    """
    Return a tokenizer that gives what *model_tokenizer* (transformers') gives, and its JSON where it needs no more.

    The two are compared on *samples*; where they differ, or transformers' has no counterpart in the library, texts go
    through transformers, and there is no JSON.
    """
    backend = getattr(model_tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        made = TextTokenizer.from_json(backend.to_str(), max_tokens=max_tokens)
        if _equal(made, lambda texts: _reference(model_tokenizer, texts, max_tokens), samples):
            return made, backend.to_str()
    return PythonTokenizer(model_tokenizer, max_tokens=max_tokens), None


def _equal(made: TextTokenizer, reference: Callable[[Sequence[str]], list[list[int]]], samples: Sequence[str]) -> bool:
    return [list(item.ids) for item in made.tokenize(samples)] == reference(samples)


def _reference(model_tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    return [list(model_tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) for text in texts]


def _beginning(text: str, chars: int) -> str:
    for at in range(chars, chars // 2, -1):
        if text[at].isspace():
            return text[:at]
    return ""


def _end(text: str, chars: int) -> str:
    for at in range(len(text) - chars, len(text) - chars // 2):
        if text[at].isspace():
            return text[at:]
    return ""
