"""Causal models that are asked whether a document answers a query, and say yes or no (Qwen3-Reranker and its like)."""

from services.common.encoders import EncoderOptions
from services.common.model_errors import ModelNotFound
from services.rerank.backends.heads import WORKING, head_of
from services.rerank.backends.pairs import PairBackend


class DecoderBackend(PairBackend):
    """
    See Backend. The raw score is the logit of the word for yes less that of the word for no, after the pair.

    Instruction, query and document stand in the model's chat template, which knows the roles `query` and `document`;
    a Qwen3 whose template does not is asked in the words of Qwen3-Reranker's model card.

    Raises:
        ModelNotFound: There is no such model, or it is none that says yes or no.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """

    def __init__(self, name: str, options: EncoderOptions, *, max_tokens: int) -> None:
        if head_of(name, revision=options.revision) != "words":
            raise ModelNotFound(f"{name} is no causal model that says yes or no; {WORKING}")
        super().__init__(
            name,
            options,
            max_tokens=max_tokens,
            kinds=("decoder", "decoder"),
            what="the logit of yes less that of no",
        )
