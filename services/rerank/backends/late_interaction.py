"""
Late interaction (MaxSim) over an embedding model's own token vectors, untrained.

A pair's raw score is the mean, over the query's tokens, of the greatest cosine to any token of the document (Khattab
and Zaharia, "ColBERT", 2020, with mean for sum so that queries of different lengths compare). A document's token
vectors are kept, so a document seen before costs no model run.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import EncoderOptions, open_encoder
from services.common.errors import InvalidInput
from services.common.tokens import Tokens
from services.rerank.ports import Pair, PreparedPair, ScorerInfo

Key = bytes
KNOWN_COST_TOKENS = 1


class _Part(NamedTuple):
    """A text by its hash: its token vectors if they are known already, else its tokens."""

    key: Key
    tokens: Tokens | None
    vectors: NDArray[np.float16] | None

    @property
    def length(self) -> int:
        if self.tokens is not None:
            return len(self.tokens.ids)
        assert self.vectors is not None
        return len(self.vectors) + 2


class TokenVectorCache:
    """Token vectors by text hash, the least recently used going first; bounded by bytes; thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Key, NDArray[np.float16]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> NDArray[np.float16] | None:
        """Return what is kept for *key*."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: Key, vectors: NDArray[np.float16]) -> None:
        """Keep *vectors*, shape [tokens, dim]."""
        with self._lock:
            if key in self._entries or vectors.nbytes > self._max_bytes:
                return
            self._entries[key] = vectors
            self._bytes += vectors.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes


class LateInteractionBackend:
    """Loads the embedding model *name* when it is made (seconds) and keeps it."""

    def __init__(self, name: str, options: EncoderOptions, *, cache_bytes: int, max_tokens: int) -> None:
        self._encoder = open_encoder(name, options)
        description = self._encoder.description
        self._max_tokens = min(max_tokens, description.max_tokens)
        lossy = "+int8" if self._encoder.precision == "int8" else ""
        self._cache = TokenVectorCache(cache_bytes)
        self._info = ScorerInfo(
            name=f"late-interaction/{name.rsplit('/', 1)[-1]}",
            kind="late-interaction",
            score="MaxSim: mean over query tokens of the greatest cosine to a document token; untrained, not calibrated",
            fingerprint=f"maxsim/1:{description.files_digest[:16]}/{self._max_tokens}{lossy}",
            max_tokens=self._max_tokens,
            runtime=f"{self._encoder.runtime} ({self._encoder.device})",
            precision=self._encoder.precision,
        )

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def prepare(self, pairs: Sequence[Pair]) -> list[PreparedPair]:
        """See Backend."""
        texts = dict.fromkeys([pair.query for pair in pairs] + [pair.text for pair in pairs])
        parts = self._parts(list(texts))
        for text in {pair.query for pair in pairs}:
            tokens = parts[text].tokens
            if tokens is None and parts[text].length >= self._max_tokens:
                # Known from when it was a document, which may have been cut.
                tokens = self._encoder.tokenize([text], max_tokens=self._max_tokens)[0]
            if tokens is not None and tokens.truncated:
                raise InvalidInput(
                    f"query is longer than the scorer's {self._max_tokens} tokens; shorten it", param="query"
                )
        prepared = []
        for pair in pairs:
            query, document = parts[pair.query], parts[pair.text]
            cost = KNOWN_COST_TOKENS if document.tokens is None else len(document.tokens.ids)
            prepared.append(PreparedPair(query.length + document.length, cost, (query, document)))
        return prepared

    def _parts(self, texts: Sequence[str]) -> dict[str, _Part]:
        keys = {text: hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts}
        known = {text: self._cache.get(key) for text, key in keys.items()}
        unknown = [text for text, vectors in known.items() if vectors is None]
        tokens: dict[str, Tokens] = {}
        if unknown:
            tokens = dict(zip(unknown, self._encoder.tokenize(unknown, max_tokens=self._max_tokens), strict=True))
        return {text: _Part(keys[text], tokens.get(text), known[text]) for text in texts}

    def score(self, batch: Sequence[PreparedPair]) -> list[float]:
        """See Backend."""
        parts = {part.key: part for pair in batch for part in pair.payload}
        vectors = {key: part.vectors for key, part in parts.items() if part.vectors is not None}
        missing: list[tuple[Key, Tokens]] = []
        for key, part in parts.items():
            if part.vectors is None and part.tokens is not None:
                made_meanwhile = self._cache.get(key)
                if made_meanwhile is None:
                    missing.append((key, part.tokens))
                else:
                    vectors[key] = made_meanwhile
        vectors |= self._encode(missing)
        return [
            _max_sim(vectors[query.key], vectors[document.key]) for query, document in (pair.payload for pair in batch)
        ]

    def _encode(self, missing: Sequence[tuple[Key, Tokens]]) -> dict[Key, NDArray[np.float16]]:
        if not missing:
            return {}
        made = {}
        for (key, tokens), token_vectors in zip(
            missing, self._encoder.per_token([tokens for _, tokens in missing]), strict=True
        ):
            # Without the special tokens at both ends: they are alike in every text and match anything.
            inner = token_vectors[1 : len(tokens.ids) - 1]
            lengths = np.maximum(np.linalg.norm(inner, axis=1, keepdims=True), 1e-12)
            made[key] = (inner / lengths).astype(np.float16)
            self._cache.put(key, made[key])
        return made

    def to_probability(self, raw: float) -> float:
        """Map a mean cosine from [-1, 1] to [0, 1]; the order stays, the value is no calibrated probability."""
        return min(1.0, max(0.0, (1.0 + raw) / 2.0))


def _max_sim(query: NDArray[np.float16], document: NDArray[np.float16]) -> float:
    if len(query) == 0 or len(document) == 0:
        return -1.0
    return float((query.astype(np.float32) @ document.astype(np.float32).T).max(axis=1).mean())
