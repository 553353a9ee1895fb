"""
Text encoders, as both model services use them: token ids in, pooled or per-token vectors out.

`open_encoder` picks what computes a model on this machine. Importing this package imports neither torch nor OpenVINO.
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
