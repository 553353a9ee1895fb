"""One model on two devices: each submission goes where it is done first."""

import asyncio

import pytest

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE
from services.embedding.embedder import Embedder
from services.embedding.engine import Work
from services.embedding.placement import BatchLimits, DeviceTurns
from tests.embedding_backends import PricedBackend, SizedBackend

LIMITS = BatchLimits(
    max_batch_tokens=2048, max_batch_items=64, max_queue_items=4096, sort_window=64, tokenizer_threads=1, hang_s=30
)


@pytest.fixture
async def devices():
    """A processor that answers at once and is slow, and an accelerator that takes its time and is fast."""
    processor = PricedBackend("cpu", batch_s=0.0005, token_s=0.0001)
    accelerator = PricedBackend("cuda", batch_s=0.008, token_s=0.000001)
    embedder = Embedder([processor, accelerator], LIMITS)
    await embedder.start()
    processor.batches.clear()
    accelerator.batches.clear()
    yield embedder, processor, accelerator
    await embedder.aclose()


async def test_small_to_the_processor_and_large_to_the_accelerator(devices):
    """Where both are idle, size decides, and the vectors are the same."""
    embedder, processor, accelerator = devices
    small = await embedder.embed(["red green"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert (sum(processor.batches), sum(accelerator.batches)) == (1, 0)
    texts = [f"text {number} " + "word " * 40 for number in range(40)]
    await embedder.embed(texts, lane=Lane.BULK, deadline=NO_DEADLINE)
    assert (sum(processor.batches), sum(accelerator.batches)) == (1, 40)
    assert small.fingerprint == "fake@1/256"


async def test_a_busy_device_is_passed_over(devices):
    """A small request that would have to wait long for the processor goes to the accelerator."""
    embedder, processor, accelerator = devices
    held = asyncio.create_task(
        embedder.placement.sites[0].batcher.submit(
            [Work("", f"{n} " + "word " * 200, 1000, n, "inputs") for n in range(20)],
            lane=Lane.QUERY,
            deadline=NO_DEADLINE,
        )
    )
    async with asyncio.timeout(10):
        while not processor.batches:
            await asyncio.sleep(0.001)
    await embedder.embed(["red green"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert sum(accelerator.batches) == 1
    await held


async def test_the_crossover_is_measured_and_told(devices):
    """The size from which the second device is faster lies between the sizes tried, and is told with both cost models."""
    embedder, _, _ = devices
    told = embedder.placement.describe()
    assert 16 < told["crossover_tokens"] <= 256
    assert [site["device"] for site in told["devices"]] == ["cpu", "cuda"]
    assert all(site["cost"]["ready"] for site in told["devices"])


async def test_different_models_are_not_one():
    """Backends with different fingerprints cannot serve one model."""
    with pytest.raises(ValueError, match="one fingerprint"):
        Embedder([SizedBackend(), SizedBackend(fingerprint="other")], LIMITS)


def test_a_device_has_one_turn():
    """All models on one device share its turn; another device has its own."""
    turns = DeviceTurns()
    assert turns.of("cpu") is turns.of("cpu")
    assert turns.of("cpu") is not turns.of("cuda")
