"""Several models in one process: names, loading on demand, the memory budget, idle unloading, failures."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable
from services.embedding import registry as registries
from services.embedding.embedder import Embedder
from services.embedding.placement import BatchLimits
from services.embedding.registry import ModelRegistry
from services.embedding.specs import ModelSpec, parse_specs
from tests.embedding_backends import SizedBackend

LIMITS = BatchLimits(
    max_batch_tokens=2048, max_batch_items=64, max_queue_items=4096, sort_window=64, tokenizer_threads=1, hang_s=30
)
MODEL_BYTES = 100


class Loader:
    """Opens fake models of 100 bytes, counts, and can be told to wait or to fail."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.backends: dict[str, SizedBackend] = {}
        self.fails: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.events: Counter[str] = Counter()

    async def open(self, spec: ModelSpec) -> Embedder:
        self.opened.append(spec.public_name)
        await self.gate.wait()
        if spec.public_name in self.fails:
            raise OSError("weights.safetensors is missing")
        backend = self.backends[spec.public_name] = SizedBackend(weights_bytes=MODEL_BYTES)
        embedder = Embedder([backend], LIMITS, name=spec.public_name)
        await embedder.start()
        return embedder

    def loaded(self, seconds: float) -> None:
        self.events["loaded"] += 1

    def load_failed(self) -> None:
        self.events["failed"] += 1

    def unloaded(self, reason: str) -> None:
        self.events[reason] += 1


@pytest.fixture
def loader() -> Loader:
    """A loader."""
    return Loader()


Open = Callable[..., ModelRegistry]


@pytest.fixture
async def make(loader: Loader) -> AsyncIterator[Open]:
    """Make registries of `a`, `b`, `c` and `d`, closed at the end."""
    made: list[ModelRegistry] = []

    def make(specs: str = "a=fake,b=fake,c=fake,d=fake", **options: object) -> ModelRegistry:
        registry = ModelRegistry(
            parse_specs(specs),
            loader.open,
            observer=loader,
            estimate_bytes=lambda _spec: MODEL_BYTES,
            **options,  # type: ignore[arg-type]
        )
        made.append(registry)
        return registry

    yield make
    loader.gate.set()
    for registry in made:
        await registry.aclose()


async def touch(registry: ModelRegistry, *names: str | None) -> None:
    """Use the models one after another."""
    for name in names:
        async with registry.use(name) as embedder:
            await embedder.embed(["text"], lane=Lane.QUERY, deadline=NO_DEADLINE)


def in_memory(registry: ModelRegistry) -> list[str]:
    """Return the names of the models that are loaded."""
    return [embedder.info.name for embedder in registry.loaded()]


# --- names ----------------------------------------------------------------------------------------------------------


async def test_names_lead_to_models(make):
    """A model is found by its alias, its name, and the part after the slash where only one has it; None is the first."""
    registry = make("org/one,x=other/two,left/same,right/same")
    for name, expected in (
        (None, "org/one"),
        ("org/one", "org/one"),
        ("one", "org/one"),
        ("x", "x"),
        ("other/two", "x"),
        ("two", "x"),
        ("left/same", "left/same"),
    ):
        async with registry.use(name) as embedder:
            assert embedder.info.name == expected
    assert registry.names() == ["org/one", "x", "left/same", "right/same"]
    assert registry.default == "org/one"
    assert registry.aliases["x"] == ["other/two", "two"]
    for name in ("same", "nothing", ""):
        with pytest.raises(NotFound, match="org/one, x, left/same, right/same") as caught:
            async with registry.use(name):
                pass
        assert caught.value.param == "model"


# --- loading --------------------------------------------------------------------------------------------------------


async def test_the_default_is_loaded_at_the_start_and_the_others_on_demand(make, loader):
    """Only what is pinned is loaded before it is asked for, and each model once."""
    registry = make("a=fake,b=fake,c=fake;pinned=true")
    await registry.start()
    assert in_memory(registry) == ["a", "c"]
    await touch(registry, "b", "b", "a")
    assert loader.opened == ["a", "c", "b"]


async def test_waiters_share_a_load(make, loader):
    """Callers that come while a model loads get that load; one that gives up does not stop it."""
    registry = make()
    loader.gate.clear()
    waiting = [asyncio.create_task(touch(registry, "b")) for _ in range(5)]
    while not loader.opened:
        await asyncio.sleep(0)
    waiting[0].cancel()
    loader.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None] * 4
    assert loader.opened == ["b"]


async def test_a_load_stalls_no_other_model(make, loader):
    """While one model loads, another answers."""
    registry = make()
    await registry.start()
    loader.gate.clear()
    slow = asyncio.create_task(touch(registry, "b"))
    while "b" not in loader.opened:
        await asyncio.sleep(0)
    await touch(registry, "a")
    assert not slow.done()
    loader.gate.set()
    await slow


async def test_a_caller_waits_for_a_load_no_longer_than_it_has(make, loader):
    """A deadline ends the wait, and not the load."""
    registry = make()
    loader.gate.clear()
    with pytest.raises(DeadlineExceeded):
        async with registry.use("b", Deadline.after(0.01)):
            pass
    loader.gate.set()
    await touch(registry, "b")
    assert loader.opened == ["b"]


async def test_a_failed_load_is_said_and_not_hammered(make, loader, monkeypatch):
    """Its waiters get a 503 that says why, so does who asks at once again; later it is tried again."""
    registry = make()
    loader.fails.add("b")
    results = await asyncio.gather(*(touch(registry, "b") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    with pytest.raises(Unavailable, match=r"b cannot be loaded.*weights\.safetensors is missing") as caught:
        await touch(registry, "b")
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= registries.RETRY_LOAD_AFTER_S
    assert loader.opened == ["b"]
    await touch(registry, "a")
    monkeypatch.setattr(registries, "RETRY_LOAD_AFTER_S", 0.0)
    loader.fails.clear()
    await touch(registry, "b")
    assert (loader.opened, loader.events["failed"]) == (["b", "a", "b"], 1)


async def test_a_default_that_cannot_be_loaded_stops_the_start(make, loader):
    """A service without its model does not start, and says why."""
    loader.fails.add("a")
    with pytest.raises(Unavailable, match="missing"):
        await make().start()


# --- memory and time ------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_makes_room(make, loader):
    """Over the budget, the model that was not asked for longest goes; it is loaded again when it is asked for."""
    registry = make(memory_bytes=3 * MODEL_BYTES)
    await registry.start()
    await touch(registry, "b", "c", "b", "d")
    assert sorted(in_memory(registry)) == ["a", "b", "d"]
    assert loader.backends["c"].closed
    await touch(registry, "c")
    assert sorted(in_memory(registry)) == ["a", "c", "d"]
    assert registry.resident_bytes() == 3 * MODEL_BYTES
    assert loader.events == {"loaded": 5, "memory": 2}


async def test_the_pinned_stay(make):
    """A pinned model is never unloaded, however long nobody asked for it; what does not fit beside it is refused."""
    registry = make("a=fake,b=fake;pinned=true,c=fake", memory_bytes=2 * MODEL_BYTES)
    await registry.start()
    with pytest.raises(Unavailable, match="no room"):
        await touch(registry, "c")
    assert in_memory(registry) == ["a", "b"]


async def test_a_model_in_use_is_not_unloaded(make):
    """Who needs room waits until somebody else is done with theirs."""
    registry = make(memory_bytes=2 * MODEL_BYTES)
    await registry.start()
    async with registry.use("b") as held:
        waiting = asyncio.create_task(touch(registry, "c"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert sorted(in_memory(registry)) == ["a", "b"]
        await held.embed(["text"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert not waiting.done()
    await waiting
    assert sorted(in_memory(registry)) == ["a", "c"]


async def test_idle_models_are_unloaded(make, loader):
    """After idle_unload_s a model goes, unless it is pinned or in use; the next caller loads it again."""
    registry = make(idle_unload_s=0.01)
    await touch(registry, "a", "b")
    async with registry.use("c"):
        await asyncio.sleep(0.02)
        await registry.unload_idle()
        assert in_memory(registry) == ["a", "c"]
    await touch(registry, "b")
    assert loader.events["idle"] == 1


async def test_scale_to_zero(make):
    """Without a pinned default nothing is loaded at the start, and everything goes when idle, by itself."""
    registry = make(idle_unload_s=0.01, pin_default=False)
    await registry.start()
    assert in_memory(registry) == []
    await touch(registry, None)
    async with asyncio.timeout(10):
        while in_memory(registry):
            await asyncio.sleep(0.005)
    await touch(registry, None)


async def test_random_use_under_a_budget(make, loader):
    """Many callers of many models at once all get answers, and the budget holds whenever one looks."""
    registry = make(memory_bytes=2 * MODEL_BYTES, pin_default=False)
    over = []

    async def caller(number: int) -> None:
        for turn in range(6):
            await touch(registry, "abcd"[(number * 7 + turn * 3) % 4])
            over.append(registry.resident_bytes() > 2 * MODEL_BYTES)

    await asyncio.gather(*(caller(number) for number in range(8)))
    assert not any(over)
    assert loader.events["loaded"] - loader.events["memory"] == len(registry.loaded())


async def test_too_many_requests_at_once_are_refused(make):
    """Beyond max_concurrent_requests a caller gets 429, and the others are none the worse."""
    registry = make(max_concurrent_requests=2)
    async with registry.use("a"), registry.use("b"):
        with pytest.raises(Overloaded):
            await touch(registry, "a")
    await touch(registry, "a")
