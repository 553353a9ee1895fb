"""Measures at warm-up what batches cost: a small grid of sizes, smallest first, within a bounded time."""

import time
from collections.abc import Awaitable, Callable

from services.common.batching.cost import CostModel, Sample

MEASURE_S = 1.0  # The last batch begins only if it should end before this.
LENGTHS_TOKENS = (8, 32, 128, 256)
BATCHES_TOKENS = (
    1,
    512,
    2_048,
)  # Of each length; the smallest is one item, and the largest batch there may be comes too.
REPEATS = 3  # The best counts: the first at a shape pays for memory and kernels, any may be disturbed.

# Runs (items, tokens each) as one batch; returns their true length, and the seconds it took.
Measure = Callable[[int, int], Awaitable[tuple[int, float]]]


async def calibrate(cost: CostModel, measure: Measure, *, max_batch_tokens: int, max_batch_items: int) -> None:
    """
    Give *cost* what *measure* finds, at least one sample, in about MEASURE_S however slow the model is.

    Raises:
        Exception: What *measure* raised; what was measured before is used.
    """
    sizes = {
        (min(max_batch_items, max(1, batch // tokens)), tokens)
        for batch in (*BATCHES_TOKENS, max_batch_tokens)
        for tokens in LENGTHS_TOKENS
        if batch <= max_batch_tokens
    }
    samples: list[Sample] = []
    started = time.monotonic()
    try:
        for items, tokens in sorted(sizes, key=lambda size: (size[0] * size[1], size[0])):
            if samples:
                cost.calibrate(samples)
                if time.monotonic() - started + REPEATS * cost.predict_s(items, tokens) > MEASURE_S:
                    break
            runs = [await measure(items, tokens) for _ in range(REPEATS)]
            samples.append((items, runs[0][0], min(seconds for _, seconds in runs)))
    finally:
        if samples:
            cost.calibrate(samples)
