"""Models with a head over a query and a document read side by side: rerankers, and classifiers of several labels."""

from services.common.encoders import EncoderOptions
from services.common.model_errors import ModelNotFound
from services.rerank.backends.decoder import DecoderBackend
from services.rerank.backends.heads import WORKING, head_of
from services.rerank.backends.pairs import PairBackend
from services.rerank.ports import Backend


def open_cross_encoder(name: str, options: EncoderOptions, *, max_tokens: int) -> Backend:
    """
    Return the scorer for the head that the model's configuration says it has. Takes seconds: call it in a thread.

    Pairs are read up to *max_tokens*, or the model's own limit if that is less.

    Raises:
        ModelNotFound: There is no such model, or it has another head; the message says which kinds work.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """
    if head_of(name, revision=options.revision) == "words":
        return DecoderBackend(name, options, max_tokens=max_tokens)
    return CrossEncoderBackend(name, options, max_tokens=max_tokens)


class CrossEncoderBackend(PairBackend):
    """
    See Backend. With one label the raw score is its logit; with two, the logit of the second less that of the first.

    Labels, activation, limit, prompt and head (transformers' own, or sentence-transformers' modules) are the model's.

    Raises:
        ModelNotFound: There is no such model, or it has another head.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """

    def __init__(self, name: str, options: EncoderOptions, *, max_tokens: int) -> None:
        if head_of(name, revision=options.revision) != "scores":
            raise ModelNotFound(f"{name} has no head that gives scores: it is a causal model; {WORKING}")
        super().__init__(
            name,
            options,
            max_tokens=max_tokens,
            kinds=("cross-encoder", "classifier"),
            what="the model's one logit",
        )
