"""One model on one device or on several: each submission goes where it is predicted to be done first."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.common.batching import Batcher, DeviceTurn, Lane
from services.embedding.engine import EmbeddingEngine, Work
from services.embedding.ports import Backend, CachedVector

CHARS_A_TOKEN = 4
SPECIAL_TOKENS = 2

TurnFor = Callable[[str], DeviceTurn]
Watch = Callable[[Batcher[Any, Any]], None]


class DeviceTurns:
    """One turn for each device, shared by every model that runs on it."""

    def __init__(self) -> None:
        self._turns: dict[str, DeviceTurn] = {}

    def of(self, device: str) -> DeviceTurn:
        """Return the turn of *device*."""
        return self._turns.setdefault(device, DeviceTurn())


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How a batcher is set: see Batcher."""

    max_batch_tokens: int
    max_batch_items: int
    max_queue_items: int
    sort_window: int
    tokenizer_threads: int
    hang_s: float


@dataclass(frozen=True, slots=True)
class Site:
    """A model on one device, behind its own batcher."""

    backend: Backend
    engine: EmbeddingEngine
    batcher: Batcher[Work, CachedVector]

    def predicted_s(self, items: int, longest_tokens: int, max_batch_tokens: int) -> float:
        """Return how long *items* of up to *longest_tokens* take here, in as many batches as they need."""
        per_batch = max(1, max_batch_tokens // max(1, longest_tokens))
        whole, rest = divmod(items, per_batch)
        seconds = whole * self.batcher.cost.predict_s(per_batch, longest_tokens) if whole else 0.0
        return seconds + (self.batcher.cost.predict_s(rest, longest_tokens) if rest else 0.0)


class Placement:
    """
    The sites of one model. All backends have one fingerprint, so that it does not matter to a caller which one worked.

    *crossover_tokens*, known after `start` and only with two sites, is the least size (tokens in all) at which the
    second is predicted to be the faster when both are idle; None where it never is.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        engines: Sequence[EmbeddingEngine],
        limits: BatchLimits,
        turn_for: TurnFor | None,
        watch: Watch | None,
    ) -> None:
        fingerprints = {backend.info.fingerprint for backend in backends}
        if len(fingerprints) != 1:
            raise ValueError(f"backends of one model must have one fingerprint, not {sorted(fingerprints)}")
        self._limits = limits
        self.crossover_tokens: int | None = None
        self.sites = [
            Site(
                backend,
                engine,
                Batcher(engine, **asdict(limits), turn=turn_for(backend.info.device) if turn_for else None),
            )
            for backend, engine in zip(backends, engines, strict=True)
        ]
        for site in self.sites:
            if watch is not None:
                watch(site.batcher)

    async def start(self) -> None:
        """Start the batchers and measure what batches cost on each device."""
        for site in self.sites:
            await site.batcher.start()
        for site in self.sites:
            await site.batcher.calibrate(_sample)
        if len(self.sites) > 1:
            self.crossover_tokens = self._crossover()

    async def aclose(self) -> None:
        """Finish what is queued, stop, and give the memory back."""
        for site in self.sites:
            await site.batcher.aclose()
            if not site.batcher.problems():  # A thread that hangs in the model may still be using it.
                await asyncio.to_thread(site.backend.close)

    def problems(self) -> list[str]:
        """Return why a site cannot work any more."""
        return [problem for site in self.sites for problem in site.batcher.problems()]

    def choose(self, work: Sequence[Work], lane: Lane) -> Batcher[Work, CachedVector]:
        """Return the batcher where *work* is predicted to be done first, what already waits there included."""
        if len(self.sites) == 1:
            return self.sites[0].batcher
        longest = max(self._tokens(one) for one in work)
        return min(self.sites, key=lambda site: self._finish_s(site, len(work), longest, lane)).batcher

    def _finish_s(self, site: Site, items: int, longest: int, lane: Lane) -> float:
        if site.batcher.problems():
            return math.inf
        return site.batcher.estimated_wait_s(lane) + site.predicted_s(items, longest, self._limits.max_batch_tokens)

    def _tokens(self, work: Work) -> int:
        """Guess from the characters, which costs nothing: the tokenizer runs later, in the batcher."""
        read = work.size if not isinstance(work.input, str) else (work.size + len(work.prompt)) // CHARS_A_TOKEN
        return min(read + SPECIAL_TOKENS, self.sites[0].backend.info.max_tokens)

    def _crossover(self) -> int | None:
        first, second = self.sites[:2]
        longest = first.backend.info.max_tokens
        sizes = [(1, 1 << power) for power in range(2, longest.bit_length()) if 1 << power < longest]
        sizes += [(1 << power, longest) for power in range(8)]
        for items, tokens in sizes:
            limit = self._limits.max_batch_tokens
            if second.predicted_s(items, tokens, limit) < first.predicted_s(items, tokens, limit):
                return items * tokens
        return None

    def describe(self) -> dict[str, Any]:
        """Return the devices, each with its cost model, and the crossover, for `/info`."""
        return {
            "devices": [
                {
                    "device": site.backend.info.device,
                    "runtime": site.backend.info.runtime,
                    "cost": site.batcher.cost.as_dict(),
                }
                for site in self.sites
            ],
            "crossover_tokens": self.crossover_tokens,
        }


def _sample(tokens: int) -> Work:
    """Return a text of about *tokens* tokens."""
    text = "word " * max(1, tokens - SPECIAL_TOKENS)
    return Work("", text, len(text), 0, "inputs")
