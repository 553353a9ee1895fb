"""How near an ONNX model's vectors are to those of the torch modules that it was made from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from services.common.encoders import Encoder
from services.common.encoders.batches import padded
from services.common.encoders.golden import GOLDEN_TEXTS, LONGEST_GOLDEN_TOKENS, agreement
from services.common.encoders.hardware import usable_cores
from services.common.tokens import Tokens

MIN_COSINE = 0.9999
# Texts up to this length share one batch of all of them, which a large model must have memory for.
_MIXED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Parity:
    """
    The least agreement over *texts* texts, each run in *batches* batches of different shapes.

    Cosines are of pooled vectors, and of token vectors; *max_abs_difference* is over the elements of pooled vectors.
    """

    texts: int
    batches: int
    min_cosine: float
    mean_cosine: float
    max_abs_difference: float
    min_token_cosine: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def compare(model_file: Path, reference: Encoder) -> Parity:
    """
    Run *model_file* in ONNX Runtime on the CPU beside *reference*, over golden texts.

    The reference computes each text alone. The model gets each alone, in pairs of different lengths and all those
    that are not very long in one padded batch, so that its shapes are seen to be free and its padding to be ignored.
    """
    tokens = [Tokens(item.ids[:LONGEST_GOLDEN_TOKENS], item.truncated) for item in reference.tokenize(GOLDEN_TEXTS)]
    pooled = np.concatenate([reference.pooled([item]) for item in tokens])
    per_token = [reference.per_token([item])[0] for item in tokens]
    model = _OnnxModel(model_file, reference.description.pad_id)
    places, vectors, token_cosines = [], [], []
    shapes = _shapes(tokens)
    for batch in shapes:
        found, found_tokens = model.run([tokens[place] for place in batch])
        places += batch
        vectors.append(found)
        for place, rows in zip(batch, found_tokens, strict=True):
            token_cosines.append(agreement(rows[: len(tokens[place].ids)], per_token[place]).least)
    made, expected = np.concatenate(vectors), pooled[places]
    cosines = agreement(made, expected)
    difference = np.abs(made - expected).max()
    return Parity(
        texts=len(tokens),
        batches=len(shapes),
        min_cosine=cosines.least,
        mean_cosine=cosines.mean,
        max_abs_difference=float(difference),
        min_token_cosine=min(token_cosines),
    )


def _shapes(tokens: Sequence[Tokens]) -> list[list[int]]:
    """Return batches of places in *tokens*."""
    alone = [[place] for place in range(len(tokens))]
    pairs = [[place, place + 1] for place in range(0, len(tokens) - 1, 2)]
    mixed = [place for place, item in enumerate(tokens) if len(item.ids) <= _MIXED_TOKENS]
    return [*alone, *pairs, mixed]


class _OnnxModel:
    def __init__(self, model_file: Path, pad_id: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
        self._pad_id = pad_id

    def run(self, batch: Sequence[Tokens]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        ids, mask = padded(batch, self._pad_id)
        names = ["sentence_embedding", "token_embeddings"]
        pooled, per_token = self._session.run(names, {"input_ids": ids, "attention_mask": mask})
        return pooled, per_token
