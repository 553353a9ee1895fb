"""Text to token ids, by the `tokenizers` library alone where it says the same as the model's own tokenizer."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from services.common.tokens import TokenPiece, Tokens, TruncationDirection

# A text longer than this a token is not tokenised whole to keep its beginning or end.
_CHARS_A_TOKEN = 24
# Tokens beside a cut that may differ from the whole text's, and are never used.
_CUT_MARGIN_TOKENS = 64


class TextTokenizer:
    """
    A model's tokenizer. Every method may be called from any thread.

    The library keeps how it truncates as state that threads would share, so texts are tokenised uncut here and the
    ids are cut: the special tokens at both ends stay.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer: Any = tokenizer
        self.max_tokens = max_tokens
        added = tokenizer.encode("a").special_tokens_mask
        self._before = added.index(0) if 0 in added else len(added)
        self._after = len(added) - self._before - added.count(0)

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
        before, after = ids[: self._before], ids[len(ids) - self._after :]
        content = ids[self._before : len(ids) - self._after]
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

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[TokenPiece]:
        """Return every token of *text*, uncut; a piece's text is the part of *text* that it covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        rows = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [
            TokenPiece(id_, token, True, None, None) if added else TokenPiece(id_, text[start:stop], False, start, stop)
            for id_, token, (start, stop), added in rows
        ]

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
        self._before = next(starts, 0)
        self._after = len(whole) - self._before - len(bare)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._slow(text, add_special_tokens=add_special_tokens, truncation=False)["input_ids"]
        return ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ids(text, True) for text in texts]

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
