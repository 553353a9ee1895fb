"""Any sentence-transformers CrossEncoder with a one-label sequence-classification head, through torch."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from services.common.encoders.batches import in_halves
from services.common.encoders.hardware import resolve_device
from services.common.encoders.torch_encoder import REDUCED, free_memory, is_out_of_memory
from services.common.errors import InvalidInput
from services.common.model_files import InvalidModel, ModelNotFound, check_model_files, files_digest, resolve_model
from services.rerank.ports import Pair, PreparedPair, ScorerInfo

LEAST_DOCUMENT_TOKENS = 8


def _longest(model: Any) -> int | None:
    """Return how many tokens the model reads; the property was renamed in sentence-transformers 6."""
    return model.max_seq_length if hasattr(model, "max_seq_length") else model.max_length  # type: ignore[no-any-return]


class CrossEncoderBackend:
    """Loads *name* when it is made (seconds) and keeps it."""

    def __init__(
        self, name: str, *, revision: str | None, precision: str, device: str, max_tokens: int, threads: int = 0
    ) -> None:
        directory = resolve_model(name, revision=revision)
        check_model_files(directory)
        if precision == "int8":
            raise InvalidModel("a cross-encoder computes at fp32, bf16 or fp16; int8 is for late interaction")
        self._device = resolve_device(device)
        if threads:
            torch.set_num_threads(threads)
        loaded = CrossEncoder(
            str(directory), device=self._device, local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        if loaded.model is None or loaded.num_labels != 1:
            raise ModelNotFound(
                f"{name} is no cross-encoder that can be used: it has {loaded.num_labels} labels; "
                "a model with a sequence-classification head of one label works"
            )
        self._model: Any = loaded.model.eval()
        self._tokenizer: Any = loaded.tokenizer
        # A tokenizer keeps how it truncates from call to call: one that threads share must always be told the same.
        self._query_tokenizer: Any = copy.deepcopy(loaded.tokenizer)
        self._autocast = REDUCED.get(precision)
        self._max_tokens = min(max_tokens, int(_longest(loaded) or max_tokens))
        self._info = ScorerInfo(
            name=name,
            kind="cross-encoder",
            score="the model's one logit; as a probability, its sigmoid",
            fingerprint=f"{directory.name}@{files_digest(directory)[:16]}/{self._max_tokens}",
            max_tokens=self._max_tokens,
            runtime=f"torch ({self._device})",
            precision="fp32" if self._autocast is None else precision,
        )

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def prepare(self, pairs: Sequence[Pair]) -> list[PreparedPair]:
        """See Backend."""
        room = self._max_tokens - LEAST_DOCUMENT_TOKENS
        for query in {pair.query for pair in pairs}:
            if len(self._query_tokenizer(query, truncation=True, max_length=room + 1)["input_ids"]) > room:
                raise InvalidInput(
                    f"query leaves no room for documents in the scorer's {self._max_tokens} tokens", param="query"
                )
        encoded = self._tokenizer(
            [pair.query for pair in pairs],
            [pair.text for pair in pairs],
            truncation="only_second",
            max_length=self._max_tokens,
        )
        names = list(encoded.keys())
        prepared = []
        for row in range(len(pairs)):
            features = {name: encoded[name][row] for name in names}
            length = len(features["input_ids"])
            prepared.append(PreparedPair(length, length, features))
        return prepared

    def score(self, batch: Sequence[PreparedPair]) -> list[float]:
        """See Backend."""
        return in_halves(self._score, batch, is_out_of_memory=is_out_of_memory, free=self._free)

    def _score(self, batch: Sequence[PreparedPair]) -> list[float]:
        features = self._tokenizer.pad([pair.payload for pair in batch], return_tensors="pt").to(self._device)
        with (
            torch.inference_mode(),
            torch.autocast(self._device, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            logits = self._model(**features).logits
        return [float(value) for value in logits.float().reshape(-1).cpu()]

    def _free(self) -> None:
        free_memory(self._device)

    def to_probability(self, raw: float) -> float:
        """Return the sigmoid of the logit."""
        return 1.0 / (1.0 + math.exp(-raw)) if raw >= 0 else math.exp(raw) / (1.0 + math.exp(raw))
