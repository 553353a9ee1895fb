"""
Text Embeddings Inference (TEI): what a server of rerankers and classifiers reads and writes.

Source: huggingface/text-embeddings-inference, router/src/http/types.rs and server.rs, router/src/lib.rs (2026).
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, FiniteFloat, Tag

from services.common.wire.base import QueryText, ReplyModel, RerankedText
from services.common.wire.rerank import FewEnough
from services.common.wire.tei import TeiServerInfo, TruncatingRequest


class TeiRerankRequest(TruncatingRequest):
    """`POST /rerank`; answered with a bare array, best first. Whether *texts* may be empty is for the route."""

    query: QueryText
    texts: Annotated[list[RerankedText], FewEnough]
    raw_scores: bool | None = None
    return_text: bool | None = None


class TeiRank(ReplyModel):
    """One text's score; *text* is left out unless it was asked for."""

    index: int
    text: str | None = None
    score: FiniteFloat


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "str"
    return "list[list]" if value and isinstance(value[0], list) else "list[str]"


_Sequence = Annotated[list[RerankedText], Field(min_length=1, max_length=2)]

# A text, one or two texts as a single input, or a list of those.
PredictInputs = Annotated[
    Annotated[RerankedText, Tag("str")]
    | Annotated[list[RerankedText], Field(max_length=2), Tag("list[str]")]
    | Annotated[list[_Sequence], FewEnough, Tag("list[list]")],
    Discriminator(_kind),
]


class TeiPredictRequest(TruncatingRequest):
    """`POST /predict`: a text, or a pair of texts as a list of two; or a list of lists of one or two."""

    inputs: PredictInputs
    raw_scores: bool | None = None

    @property
    def is_batch(self) -> bool:
        """Whether several inputs are asked about, so that the answer is a list of lists."""
        return bool(self.inputs) and isinstance(self.inputs[0], list)

    def sequences(self) -> list[tuple[str, str | None]]:
        """Return the inputs, each with its second text, if it has one; an empty list where there is none."""
        if isinstance(self.inputs, str):
            return [(self.inputs, None)]
        several = [one for one in self.inputs if isinstance(one, list)]
        single = [one for one in self.inputs if isinstance(one, str)]
        return [(one[0], one[1] if len(one) > 1 else None) for one in (several or [single]) if one]


class TeiPrediction(ReplyModel):
    """One label's score."""

    score: FiniteFloat
    label: str


class TeiLabels(ReplyModel):
    """A model's labels by their number, as strings, and the numbers by label."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class TeiRerankInfo(TeiServerInfo):
    """`GET /info` of a server of rerankers (one label) or classifiers: which of them it is, with the labels."""

    model_type: dict[Literal["reranker", "classifier"], TeiLabels]
