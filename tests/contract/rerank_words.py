"""The fake scorer with small limits, scores of its own and labels, behind the rerank service's app."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from services.rerank.app import create_app
from services.rerank.backends.fake import FakeBackend
from services.rerank.ports import QueryTokens, Window
from services.rerank.settings import RerankSettings

SPECIAL_TOKENS = 3
QUERY = "red green"
DOCUMENTS = ["red", "a red and a green one", "", "black"]
ORDER = [1, 0, 2, 3]
SCORES = [1.0, 0.5, 0.0, 0.0]
# Of twenty words; seven fit beside the query, so that there are five windows, of which the fourth has both colours.
WORDS = [f"w{number}" for number in range(20)]
LONG = " ".join([*WORDS[:14], "red", "green", *WORDS[16:]])
BEST = LONG[LONG.index("w12") : LONG.index("w19") - 1]
LONG_QUERY = "red green blue white grey pink brown black"
LATE = {"x-deadline-ms": "0.001"}


class WordBackend(FakeBackend):
    """
    A word is a token, and there are three special ones; the raw score is ten times the share of the query's words.

    With *labels* it is a classifier: its first output is that score, 10 for a text that stands alone; the others are 0.
    """

    def __init__(self, *, max_tokens: int = 12, labels: tuple[str, ...] = ()) -> None:
        super().__init__(max_tokens)
        self._info = replace(self._info, name="words", fingerprint="words@1", labels=labels, ranks=len(labels) < 3)

    def room(self, query: QueryTokens) -> int:
        """See Backend."""
        return super().room(query) - SPECIAL_TOKENS

    def tokens(self, window: Window) -> int:
        """See Backend."""
        return super().tokens(window) + SPECIAL_TOKENS

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        outputs = np.zeros((len(batch), max(1, len(self._info.labels))), dtype=np.float32)
        outputs[:, 0] = super().score(batch)[:, 0] * 10
        outputs[[window.document is None for window in batch], 0] = 10
        return outputs

    def to_probability(self, raw: float) -> float:
        """See Backend."""
        return raw / 10


def app_of(backend: FakeBackend, **settings: Any) -> FastAPI:
    """Return the rerank service's app around *backend*, with RERANK_* *settings*."""
    return create_app(RerankSettings(model="fake", **settings), load=lambda _settings: [backend])


async def post(client: httpx2.AsyncClient, path: str, body: dict[str, Any], **options: Any) -> Any:
    """Post *body*, which must be answered."""
    response = await client.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.json()
