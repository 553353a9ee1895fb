"""What the candidates for computing a scorer of pairs are held to; see Trial."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.golden import LONGEST_GOLDEN_TOKENS
from services.common.encoders.pairs.form import PairTokenizer, PairTokens
from services.common.encoders.pairs.golden import (
    GOLDEN_PAIRS,
    MAX_PROBABILITY_ERROR,
    MIN_CORRELATION,
    SHORT_GOLDEN_PAIRS,
    Closeness,
    closeness,
)
from services.common.encoders.pairs.model import PairModel
from services.common.encoders.trial import Verdict, batch_items

_BATCH_TOKENS, _SHORT_TOKENS = 130, 24
_MAX_BATCH_TOKENS = 4096


class PairTrial:
    """See Trial: pairs of many lengths and scripts, whose scores are compared."""

    unit = "pair"
    least_nearness = 1.0 - MAX_PROBABILITY_ERROR

    def __init__(self, reference: PairModel) -> None:
        self._reference = reference
        self._tokenizer = reference.tokenizer
        self.golden = short_outputs(reference)

    @cached_property
    def _batches(self) -> list[list[PairTokens]]:
        batches: list[list[PairTokens]] = []
        pairs = [joined(self._tokenizer, query, text, LONGEST_GOLDEN_TOKENS) for query, text in GOLDEN_PAIRS]
        for pair in sorted(pairs, key=lambda each: len(each.tokens.ids)):
            if not batches or (len(batches[-1]) + 1) * len(pair.tokens.ids) > _MAX_BATCH_TOKENS:
                batches.append([])
            batches[-1].append(pair)
        return batches

    @cached_property
    def _expected(self) -> NDArray[np.float32]:
        return self._outputs(self._reference)

    def _outputs(self, model: PairModel) -> NDArray[np.float32]:
        return np.concatenate([model.outputs(batch) for batch in self._batches])

    def judge(self, model: PairModel | None) -> Verdict:
        """See Trial."""
        found = Closeness(1.0, 0.0) if model is None else closeness(self._outputs(model), self._expected)
        return Verdict(
            {
                "correlation": round(found.correlation, 6),
                "max_probability_error": round(found.probability_error, 6),
            },
            1.0 - found.probability_error,
            found.passes,
            f"its scores over the golden pairs correlate {found.correlation:.5f} with fp32's, and no probability is "
            f"further than {found.probability_error:.4f} off",
            f"where {MIN_CORRELATION} and {MAX_PROBABILITY_ERROR} are asked",
        )

    def nearness(self, model: PairModel) -> float:
        """See Trial."""
        return pair_nearness(model, self.golden)

    def batch(self, model: PairModel) -> int:
        """See Trial."""
        items = batch_items(model.device)
        model.outputs([self._samples[_BATCH_TOKENS]] * items)
        return items

    def short(self, model: PairModel) -> None:
        """See Trial."""
        model.outputs([self._samples[_SHORT_TOKENS]])

    @cached_property
    def _samples(self) -> dict[int, PairTokens]:
        text = "The quick brown fox jumps over the lazy dog again. " * 40
        return {
            tokens: joined(self._tokenizer, "What does the fox do?", text, tokens)
            for tokens in (_BATCH_TOKENS, _SHORT_TOKENS)
        }


def joined(tokenizer: PairTokenizer, query: str, document: str, most_tokens: int) -> PairTokens:
    """Return a pair's tokens, the document cut so that there are *most_tokens* where the query allows it."""
    ids, _ = tokenizer.query(query)
    content, _ = tokenizer.documents([document])[0]
    room = min(tokenizer.room(ids), max(1, most_tokens - tokenizer.size(len(ids), 0)))
    return tokenizer.join(ids, content[:room])


def short_outputs(model: PairModel) -> NDArray[np.float32]:
    """Return what *model* makes of SHORT_GOLDEN_PAIRS, shape [pairs, outputs]."""
    pairs = [joined(model.tokenizer, query, text, LONGEST_GOLDEN_TOKENS) for query, text in SHORT_GOLDEN_PAIRS]
    return model.outputs(pairs)


def pair_nearness(model: PairModel, golden: NDArray[np.float32]) -> float:
    """Return 1 less how far a probability of *model*'s for SHORT_GOLDEN_PAIRS is off that of *golden* at most."""
    return 1.0 - closeness(short_outputs(model), golden).probability_error
