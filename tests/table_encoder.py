"""An encoder whose token vectors are rows of a table, so that a test knows them, and which counts what it computes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from services.common.encoders import ModelDescription, TextTokenizer
from services.common.tokens import Tokens

DIM = 24
MAX_TOKENS = 32
WORDS = (
    "red",
    "green",
    "blue",
    "black",
    "white",
    "cat",
    "dog",
    "bird",
    "fish",
    "frog",
    ",",
    "?",
    *(f"w{n}" for n in range(50)),
)
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
VOCABULARY = {word: id_ for id_, word in enumerate((*_SPECIAL, *WORDS))}


def word_tokenizer(max_tokens: int = MAX_TOKENS) -> TextTokenizer:
    """Return one that makes a token of each of WORDS, some of them punctuation, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
    )
    return TextTokenizer(tokenizer, max_tokens=max_tokens)


class TableEncoder:
    """
    See Encoder. A token's vector is its id's row of *table*; *read* has the ids of every text that was computed.

    Special tokens have the vectors of the first words, so that whoever forgets to leave them out gets other scores.
    """

    runtime, device, precision, reason, weights_bytes = "table", "cpu", "fp32", "", 0

    def __init__(self, *, seed: int = 3) -> None:
        self.table: NDArray[np.float32] = np.random.default_rng(seed).normal(size=(len(VOCABULARY), DIM)) * 3
        self.table = self.table.astype(np.float32)
        self.table[: len(_SPECIAL)] = self.table[len(_SPECIAL) : 2 * len(_SPECIAL)]
        self.tokenizer = word_tokenizer()
        self.measured: dict[str, dict[str, float]] = {}
        self.read: list[list[int]] = []
        self.description = ModelDescription(
            name="table",
            directory=Path("table"),
            files_digest=f"{seed}" * 64,
            variant="",
            digest=f"{seed}" * 64,
            dim=DIM,
            token_dim=DIM,
            max_tokens=MAX_TOKENS,
            prompts={},
            default_prompt=None,
            pools_prompt=True,
            pooling="mean",
            dimensions=(),
            vocabulary_size=len(VOCABULARY),
            pad_id=0,
            weights_bytes=0,
            model_type="table",
            similarity="cosine",
        )

    def tokenize(self, texts: Sequence[str], *, max_tokens=None, direction="right") -> list[Tokens]:
        """See Encoder."""
        return self.tokenizer.tokenize(texts, max_tokens, direction)

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Encoder."""
        return np.stack([vectors.mean(axis=0) for vectors in self.per_token(batch)])

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Encoder."""
        assert all(len(item.ids) <= MAX_TOKENS for item in batch)
        self.read += [list(item.ids) for item in batch]
        return [self.table[list(item.ids)] for item in batch]

    def close(self) -> None:
        """See Encoder."""
