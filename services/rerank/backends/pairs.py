"""A Backend over a scorer of pairs: a query's and a document's tokens are joined when they are scored."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import EncoderOptions
from services.common.encoders.pairs.form import PairTokens
from services.common.encoders.pairs.opening import open_pair_model
from services.common.encoders.protocol import fingerprint
from services.rerank.logits import sigmoid
from services.rerank.ports import DocumentTokens, Kind, QueryTokens, ScorerInfo, Window, text_key

# By the activation of a model with one output, in torch.nn's names. Where a configuration leaves the logit as it is
# (ms-marco), or has an activation unknown here, it is the sigmoid that brings it to 0 to 1 in the same order.
_TO_PROBABILITY: Mapping[str, tuple[Callable[[float], float], str]] = {
    "Tanh": (lambda raw: (1.0 + math.tanh(raw)) / 2.0, "its hyperbolic tangent, brought from -1 to 1 to 0 to 1"),
}
_SIGMOID = (sigmoid, "its sigmoid")


class PairBackend:
    """
    See Backend. Loads *name* when it is made (seconds) and keeps it; *kinds* are what it is with one output and more.

    *what* says in words what the raw score is of a model with one output.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """

    def __init__(
        self, name: str, options: EncoderOptions, *, max_tokens: int, kinds: tuple[Kind, Kind], what: str
    ) -> None:
        self._model = open_pair_model(name, replace(options, max_tokens=max_tokens))
        self._tokenizer = self._model.tokenizer
        about = self._model.description
        one = about.outputs == 1
        self._outputs = about.outputs
        self._probability, words = _TO_PROBABILITY.get(about.activation, _SIGMOID) if one else _SIGMOID
        if not one:
            what = f"the logit of {about.labels[1]} less that of {about.labels[0]}" if about.outputs == 2 else ""
        self._info = ScorerInfo(
            name=name,
            kind=kinds[0] if one else kinds[1],
            score=f"{what}; as a probability, {words}" if what else "none: its labels are no order of relevance",
            fingerprint=fingerprint(name, about, self._model.precision),
            max_tokens=about.max_tokens,
            runtime=f"{self._model.runtime} ({self._model.device})",
            precision=self._model.precision,
            labels=() if one else about.labels,
            ranks=about.outputs <= 2,
        )

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def tokenize_query(self, text: str) -> QueryTokens:
        """See Backend."""
        ids, cut = self._tokenizer.query(text)
        return QueryTokens(text_key(text), ids, cut)

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """See Backend."""
        contents = self._tokenizer.documents(texts)
        return [DocumentTokens(text_key(text), *content) for text, content in zip(texts, contents, strict=True)]

    def room(self, query: QueryTokens) -> int:
        """See Backend."""
        return self._tokenizer.room(query.ids)

    def tokens(self, window: Window) -> int:
        """
        See Backend.

        Raises:
            InvalidInput: The window has no document, and the model reads pairs only.
        """
        document = None if window.document is None else window.end - window.start
        return self._tokenizer.size(len(window.query.ids), document)

    def cost_tokens(self, window: Window) -> int:
        """See Backend."""
        return self.tokens(window)

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        return self._model.outputs([self._joined(window) for window in batch])

    def _joined(self, window: Window) -> PairTokens:
        document = None if window.document is None else window.document.ids[window.start : window.end]
        return self._tokenizer.join(window.query.ids, document)

    def relevance(self, output: NDArray[np.float32]) -> float:
        """See Backend: the one output, or the second less the first."""
        return float(output[0]) if self._outputs == 1 else float(output[1]) - float(output[0])

    def to_probability(self, raw: float) -> float:
        """See Backend: what the model's own activation makes of it, or its sigmoid; of two labels, the softmax."""
        return self._probability(raw)

    def close(self) -> None:
        """See Backend."""
        self._model.close()
