"""What the batcher needs from a model, and what it tells about the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from services.common.batching.queue import Lane

Item = TypeVar("Item", contravariant=True)
Prepared = TypeVar("Prepared")
Output = TypeVar("Output", covariant=True)
OutputT = TypeVar("OutputT")


class Engine(Protocol[Item, Prepared, Output]):
    """
    What is batched: a model with its tokenizer. Methods run in threads; `run` always in the same one.

    More is optional. `quick(items) -> bool` says that preparing *items* takes a few tens of microseconds
    and may be done in the event loop, beside calls of `prepare` in other threads; without it nothing is. `size(item) -> int`
    is what preparing an item costs, in characters; without it items count as small. `pads`, a bool, says whether an item in a
    batch costs as much as the longest; without it, it does.
    """

    def prepare(self, items: Sequence[Item]) -> Sequence[Prepared]:
        """Tokenise *items*; one result each, in order."""
        ...

    def tokens(self, prepared: Prepared) -> int:
        """Return how many tokens the model will read for one prepared item."""
        ...

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output]:
        """
        Return one output for each prepared item, in order.

        Raises:
            OutOfMemory: The device has no memory for a batch of this size.
        """
        ...


@dataclass(frozen=True, slots=True)
class Submission(Generic[OutputT]):
    """Outputs in the order of the items (None where the deadline came first), and where the time went."""

    outputs: list[OutputT | None]
    tokenization_ms: float
    queue_ms: float
    inference_ms: float


@dataclass(frozen=True, slots=True)
class BatchObservation:
    """
    What one batch was, for metrics. *padded_tokens* counts what the model computed, *tokens* what was asked.

    *waits_s* is how long each item waited in the queue.
    """

    lane: Lane
    items: int
    tokens: int
    padded_tokens: int
    seconds: float
    waits_s: Sequence[float]
