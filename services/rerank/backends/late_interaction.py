"""
Late interaction (MaxSim) over an embedding model's own token vectors, untrained.

A pair's raw score is the mean, over the query's tokens, of the greatest cosine to any token of the document (Khattab
and Zaharia, "ColBERT", 2020, with mean for sum so that queries of different lengths compare). As there, punctuation in
documents is left out of it: it is a tenth of the tokens, and rankings are a little better without. A document's token
vectors are kept, so a document seen before costs a multiplication and no model run.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import EncoderOptions, Projection, open_encoder
from services.common.tokens import Tokens
from services.rerank.backends.token_projection import token_projection
from services.rerank.backends.token_vectors import (
    MaxSim,
    TokenVectors,
    Vectors,
    in_one_thread,
    packed,
    quantized,
    unpacked,
)
from services.rerank.kept import KeptByBytes
from services.rerank.ports import KEY_BYTES, DocumentTokens, QueryTokens, ScorerInfo, Window, text_key

# Tokens of known vectors that take about as long as one that the model computes.
KNOWN_TOKENS_A_COST: Final = 128
QUERY_CACHE_BYTES: Final = 8 * 1024 * 1024
# Token vectors that wait for others to take them; of more than this in one go only the latest are offered.
FRESH_BYTES: Final = 16 * 1024 * 1024
# A batch is larger than it was meant to be where vectors that were known are forgotten before it is its turn.
MOST_RUN_TOKENS: Final = 16_384

FORM: Final = "maxsim/2"  # Another name for each change of what is computed from the same tokens.
_PLACE: Final = struct.Struct("<II")


class LateInteractionBackend:
    """
    Loads the embedding model *name* when it is made (seconds) and keeps it. See Backend and SharesVectors.

    Query and document are read apart, so that a document's vectors serve every query: each in up to *max_tokens*, or
    what the model reads if that is less. *cache_bytes* bounds the memory for documents' vectors. *dimensions* less
    than the model's own are kept of each vector (see token_projection); 0 keeps all.
    """

    def __init__(
        self,
        name: str,
        options: EncoderOptions,
        *,
        cache_bytes: int,
        max_tokens: int,
        dimensions: int = 0,
    ) -> None:
        self._encoder = open_encoder(name, options)
        description = self._encoder.description
        self._before, self._after = self._encoder.tokenizer.before, self._encoder.tokenizer.after
        self._punctuation = self._encoder.tokenizer.punctuation()
        self._projection: Projection | None = None
        if 0 < dimensions < description.token_dim:
            self._projection = token_projection(self._encoder, dimensions)
        self._dim = dimensions if self._projection else description.token_dim
        self._max_sim = MaxSim(self._dim)
        self._documents: KeptByBytes[TokenVectors] = KeptByBytes(cache_bytes)
        self._queries: KeptByBytes[Vectors] = KeptByBytes(QUERY_CACHE_BYTES)
        self._fresh: KeptByBytes[TokenVectors] = KeptByBytes(FRESH_BYTES)
        self._info = self._described(name, min(max_tokens, description.max_tokens))
        # A window's vectors are the same however much could have been read at once.
        identity = f"{FORM}:{description.digest}{self._variant()}"
        self._tag = hashlib.blake2b(identity.encode(), digest_size=KEY_BYTES).digest()
        # A runtime prepares itself when it is first asked for token vectors, which takes seconds.
        self._encode([self.tokenize_query("Ready?").ids])

    def _described(self, name: str, max_tokens: int) -> ScorerInfo:
        encoder, fewer = self._encoder, ""
        if self._projection:
            fewer = f", in {self._dim} of {encoder.description.token_dim} dimensions"
        return ScorerInfo(
            name=f"late-interaction/{name.rstrip('/').rsplit('/', 1)[-1]}",
            kind="late-interaction",
            score=f"MaxSim: mean over query tokens of the greatest cosine to a document token{fewer}; "
            "untrained, not calibrated",
            fingerprint=f"{FORM}:{encoder.description.digest[:16]}/{max_tokens}{self._variant()}",
            max_tokens=max_tokens,
            runtime=f"{encoder.runtime} ({encoder.device})",
            precision=encoder.precision,
        )

    def _variant(self) -> str:
        lossy = "+int8" if self._encoder.precision == "int8" else ""
        return lossy + (f"+{self._projection.name}" if self._projection else "")

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def tokenize_query(self, text: str) -> QueryTokens:
        """See Backend."""
        tokens = self._encoder.tokenize([text], max_tokens=self._info.max_tokens // 2)[0]
        ids = np.array(tokens.ids[len(self._before) : len(tokens.ids) - len(self._after)], dtype=np.int32)
        return QueryTokens(text_key(text), ids, tokens.truncated)

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """See Backend."""
        contents = self._encoder.tokenizer.content(texts)
        return [DocumentTokens(text_key(text), *content) for text, content in zip(texts, contents, strict=True)]

    def room(self, query: QueryTokens) -> int:
        """See Backend; the same beside any query, for they are read apart."""
        return self._info.max_tokens - self._special

    @property
    def _special(self) -> int:
        return len(self._before) + len(self._after)

    def tokens(self, window: Window) -> int:
        """See Backend."""
        return len(window.query.ids) + self._special + self._document_tokens(window)

    def _document_tokens(self, window: Window) -> int:
        return 0 if window.document is None else window.end - window.start + self._special

    def cost_tokens(self, window: Window) -> int:
        """See Backend; known token vectors cost a multiplication."""
        if window.document is None or self._documents.get(self._key(window)) is not None:
            return 1 + (window.end - window.start) // KNOWN_TOKENS_A_COST
        return self._document_tokens(window)

    def _key(self, window: Window) -> bytes:
        assert window.document is not None
        return self._tag + _PLACE.pack(window.start, window.end) + window.document.key

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend; a window without a document is like nothing."""
        keys = [b"" if window.document is None else self._key(window) for window in batch]
        queries, documents = self._vectors(batch, keys)
        of_query: dict[bytes, list[int]] = {}
        for position, window in enumerate(batch):
            of_query.setdefault(window.query.key, []).append(position)
        outputs = np.empty((len(batch), 1), dtype=np.float32)
        for key, positions in of_query.items():
            outputs[positions, 0] = self._max_sim(queries[key], [documents[keys[position]] for position in positions])
        return outputs

    def _vectors(
        self, batch: Sequence[Window], keys: Sequence[bytes]
    ) -> tuple[dict[bytes, Vectors], dict[bytes, TokenVectors]]:
        """Return the vectors of the queries and of the documents in *batch*; the model computes those that lack."""
        queries = {window.query.key: self._queries.get(window.query.key) for window in batch}
        documents = {key: self._documents.get(key) for key in keys}
        new_queries = {each.query.key: each.query.ids for each in batch if queries[each.query.key] is None}
        new_documents = {
            key: np.empty(0, np.int32) if window.document is None else window.document.ids[window.start : window.end]
            for key, window in zip(keys, batch, strict=True)
            if documents[key] is None
        }
        made = iter(self._encode([*new_queries.values(), *new_documents.values()]))
        known_queries = {key: value for key, value in queries.items() if value is not None}
        known_documents = {key: value for key, value in documents.items() if value is not None}
        for key in new_queries:
            known_queries[key] = self._keep_query(key, next(made))
        for key, ids in new_documents.items():
            known_documents[key] = self._keep_document(key, ids, next(made))
        return known_queries, known_documents

    def _encode(self, texts: Sequence[NDArray[np.int32]]) -> list[Vectors]:
        """Return the token vectors of *texts*, of any length, without the special tokens around them."""
        # Special tokens are much alike in every text, and match anything.
        framed = [Tokens([*self._before, *ids.tolist(), *self._after], truncated=False) for ids in texts]
        made = [np.empty((0, self._dim), np.float32)] * len(texts)
        for positions in _grouped([len(ids) for ids in texts]):
            for position, vectors in zip(
                positions, self._encoder.per_token([framed[position] for position in positions]), strict=True
            ):
                made[position] = self._inner(vectors)
        return made

    def _inner(self, vectors: Vectors) -> Vectors:
        inner = vectors[len(self._before) : len(vectors) - len(self._after)]
        if self._projection is None:
            return inner
        with in_one_thread():
            return inner @ self._projection.components.T

    def _keep_query(self, key: bytes, vectors: Vectors) -> Vectors:
        """Return *vectors* as unit vectors over their number, so that the sum of their greatest products is a mean."""
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        made: Vectors = vectors / (lengths * max(1, len(vectors)))
        if len(made) and np.isfinite(made).all():
            self._queries.put(key, made)
        return made

    def _keep_document(self, key: bytes, ids: NDArray[np.int32], vectors: Vectors) -> TokenVectors:
        words = ~np.isin(ids, self._punctuation)
        made = quantized(vectors[words] if words.any() else vectors)
        if len(made.codes) and made.finite:
            self._documents.put(key, made)
            self._fresh.put(key, made)
        return made

    def relevance(self, output: NDArray[np.float32]) -> float:
        """See Backend."""
        return float(output[0])

    def to_probability(self, raw: float) -> float:
        """Map a mean cosine from [-1, 1] to [0, 1]; the order stays, the value is no calibrated probability."""
        return min(1.0, max(0.0, (1.0 + raw) / 2.0))

    def close(self) -> None:
        """See Backend."""
        self._encoder.close()
        for kept in (self._documents, self._fresh):
            kept.drain()
        self._queries.drain()

    def lacking(self, windows: Sequence[Window]) -> list[bytes]:
        """See SharesVectors."""
        keys = dict.fromkeys(self._key(each) for each in windows if each.document is not None and each.end > each.start)
        return [key for key in keys if self._documents.get(key) is None]

    def take(self, key: bytes, value: bytes) -> None:
        """See SharesVectors."""
        place = key[KEY_BYTES : KEY_BYTES + _PLACE.size]
        if not key.startswith(self._tag) or len(place) != _PLACE.size:
            return
        start, end = _PLACE.unpack(place)
        vectors = unpacked(value, most_tokens=end - start, dim=self._dim)
        if vectors is not None:
            self._documents.put(key, vectors)

    def fresh(self) -> list[tuple[bytes, bytes]]:
        """See SharesVectors."""
        return [(key, packed(vectors)) for key, vectors in self._fresh.drain()]


def _grouped(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the positions of *lengths* over 0, longest first, in runs that padded to their longest have MOST_RUN_TOKENS."""
    run: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        if run and lengths[run[0]] * (len(run) + 1) > MOST_RUN_TOKENS:
            yield run
            run = []
        if lengths[position]:
            run.append(position)
    if run:
        yield run
