"""
A sentence-transformers encoder as both model services use it: token ids in, pooled or per-token vectors out.

Kept apart from the batcher, which knows no torch; importing this module imports torch, so only backends do, late.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from services.common.model_files import files_digest, resolve_model
from services.common.tokens import Tokens

log = structlog.get_logger(__name__)

Precision = Literal["auto", "fp32", "bf16"]
MIN_COSINE = 0.999
GOLDEN_TEXTS = (
    "A short question?",
    "The quick brown fox jumps over the lazy dog, and then it does so again.",
    "Naïve café, 東京, Москва, 12,345.67 € — punctuation; and symbols: <tag> {json: true} #hash",
    "word " * 200,
)


class Encoder:
    """
    A loaded model. `tokenize` may be called from any thread, the others from one thread at a time.

    *precision* `auto` takes bf16 where the processor computes it natively and the golden texts' vectors stay within
    a cosine of 0.999 of fp32's, else fp32.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, precision: Precision = "auto", device: str = "auto"
    ) -> None:
        self.directory: Path = resolve_model(name, revision=revision)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._model = SentenceTransformer(str(self.directory), device=self.device, local_files_only=True).eval()
        self._tokenizer: Any = self._model.tokenizer
        self.max_tokens = int(self._model.max_seq_length or 512)
        self.dim = int(self._model.get_embedding_dimension() or 0)
        self.prompts: dict[str, str] = {key: value for key, value in self._model.prompts.items() if value}
        self.digest = files_digest(self.directory)
        self._bf16 = False
        self.precision, self.precision_reason = self._choose(precision)

    def _choose(self, precision: Precision) -> tuple[str, str]:
        if precision == "fp32":
            return "fp32", "asked for"
        if precision == "auto" and not _has_native_bf16(self.device):
            return "fp32", "the processor has no native bf16"
        tokens = self.tokenize(GOLDEN_TEXTS)
        exact = self.pooled(tokens)
        self._bf16 = True
        reduced = self.pooled(tokens)
        lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(reduced, axis=1)
        cosine = float(np.min(np.sum(exact * reduced, axis=1) / lengths))
        if cosine >= MIN_COSINE or precision == "bf16":
            return "bf16", f"least cosine to fp32 over the golden texts is {cosine:.5f}"
        self._bf16 = False
        log.warning("precision_refused", precision="bf16", min_cosine=round(cosine, 5), bound=MIN_COSINE)
        return "fp32", f"bf16 refused: least cosine {cosine:.5f} is under {MIN_COSINE}"

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[Tokens]:
        """Tokenise *texts* in order, each cut to the model's limit or *max_tokens*."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        encodings = self._tokenizer(list(texts), truncation=True, max_length=limit).encodings
        return [Tokens(encoding.ids, bool(encoding.overflowing)) for encoding in encodings]

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """Return what the model's own modules make of each text: float32, shape [len(batch), dim]."""
        return np.asarray(self._forward(batch)["sentence_embedding"].float().cpu())

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """Return each text's token vectors, unit length, special tokens included: float32, shape [len(ids), dim] each."""
        vectors = torch.nn.functional.normalize(self._forward(batch)["token_embeddings"].float(), dim=-1).cpu().numpy()
        return [vectors[row, : len(tokens.ids)] for row, tokens in enumerate(batch)]

    def _forward(self, batch: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        longest = max(len(tokens.ids) for tokens in batch)
        ids = torch.full((len(batch), longest), int(self._tokenizer.pad_token_id or 0), dtype=torch.long)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens.ids)] = torch.as_tensor(tokens.ids)
            mask[row, : len(tokens.ids)] = 1
        features = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        with torch.inference_mode(), torch.autocast(self.device, dtype=torch.bfloat16, enabled=self._bf16):
            output: dict[str, torch.Tensor] = self._model(features)
        return output


def _has_native_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
