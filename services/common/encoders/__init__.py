"""
Text encoders, as both model services use them: token ids in, pooled or per-token vectors out; and scorers of pairs.

`open_encoder` picks what computes a model on this machine, and so does `pairs.opening.open_pair_model` for a cross-encoder.
Importing this package imports neither torch nor OpenVINO.
"""

from services.common.encoders.description import ModelDescription
from services.common.encoders.opening import open_encoder
from services.common.encoders.projection import Projection
from services.common.encoders.protocol import (
    Device,
    Encoder,
    EncoderOptions,
    PoolingMode,
    Precision,
    Runtime,
    fingerprint_of,
)
from services.common.encoders.tokenizer import TextTokenizer

__all__ = [
    "Device",
    "Encoder",
    "EncoderOptions",
    "ModelDescription",
    "PoolingMode",
    "Precision",
    "Projection",
    "Runtime",
    "TextTokenizer",
    "fingerprint_of",
    "open_encoder",
]
