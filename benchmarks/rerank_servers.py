"""What the rerank benchmark asks, and whom: requests of known length, our own service, and Infinity."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.servers import OURS, ServerSpec, as_json, infinity
from benchmarks.stack import service_spec
from benchmarks.texts import MARKERS, texts
from services.common.model_files import DEFAULT_MODEL
from services.rerank.settings import LATE_INTERACTION, NONE, RerankSettings

PAIR_TOKENS = 128
QUERY_WORDS = 8
PAIR_MARKERS = 3  # Tokens that the tokenizer puts around and between the two texts of a pair.
DOCUMENT_WORDS = PAIR_TOKENS - PAIR_MARKERS - QUERY_WORDS

SHIPPED = f"{OURS}, as shipped"
MAX_SIM = f"{LATE_INTERACTION}{DEFAULT_MODEL}"


def requests(count: int, documents: int, seed: int) -> list[list[str]]:
    """
    Return *count* requests, each a query and then *documents* documents, PAIR_TOKENS tokens a pair; no text comes twice.

    Of the same seed fewer are a prefix of more.
    """
    queries = texts(count, QUERY_WORDS + MARKERS, seed)
    made = texts(count * documents, DOCUMENT_WORDS + MARKERS, seed)
    return [[query, *made[number * documents : (number + 1) * documents]] for number, query in enumerate(queries)]


def rerank(name: str = OURS, *, model: Path | str | None = None) -> ServerSpec:
    """Return our own service with *model* alone; without one, with its defaults."""
    alone = {} if model is None else {"RERANK_MODEL": str(model), "RERANK_FIRST_STAGE": NONE}
    return replace(service_spec(name, "rerank", **alone), path="/rerank", body=_body)


def has_shipped_model() -> bool:
    """Return whether a cross-encoder is served by default."""
    return not str(RerankSettings.model_fields["model"].default).startswith(LATE_INTERACTION)


def infinity_rerank(model: Path) -> ServerSpec | None:
    """Return Infinity with the cross-encoder in *model*; None, having said so, where it is not installed."""
    return infinity(
        str(model),
        "/rerank",
        lambda texts, fields: as_json({"query": texts[0], "documents": list(texts[1:]), "model": str(model)}),
    )


def _body(texts: Sequence[str], fields: Mapping[str, str]) -> bytes:
    return as_json({"query": texts[0], "documents": list(texts[1:]), **fields})
