"""The models of this process by name: loaded when they are asked for, unloaded when memory or time is up."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from math import inf
from types import TracebackType
from typing import Protocol

import structlog

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, NotFound, NotReady, Overloaded, TercetError, Unavailable
from services.common.model_errors import ModelNotFound
from services.embedding.embedder import Embedder
from services.embedding.specs import ModelSpec

log = structlog.get_logger(__name__)

RETRY_LOAD_AFTER_S = 5.0
WAIT_FOR_ROOM_S = 10.0
SWEEP_EVERY_S = 30.0


class RegistryObserver(Protocol):
    """What is told of loads and unloads, for metrics."""

    def loaded(self, seconds: float) -> None:
        """A model was loaded and warmed up."""
        ...

    def load_failed(self) -> None:
        """A model could not be loaded."""
        ...

    def unloaded(self, reason: str) -> None:
        """A model was unloaded, for `memory` or because it was `idle`."""
        ...


@dataclass(slots=True, eq=False)
class _Slot:
    spec: ModelSpec
    pinned: bool
    embedder: Embedder | None = None
    users: int = 0
    used_at: float = 0.0
    loading: "asyncio.Task[None] | None" = None
    failure: TercetError | None = None
    failed_at: float = 0.0
    names: list[str] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody needs it."""
        return self.embedder is not None and self.users == 0


class _Use(AbstractAsyncContextManager[Embedder]):
    """Holds a model while a request works with it."""

    __slots__ = ("_deadline", "_name", "_registry", "_slot")

    def __init__(self, registry: "ModelRegistry", name: str | None, deadline: Deadline) -> None:
        self._registry = registry
        self._name = name
        self._deadline = deadline
        self._slot: _Slot | None = None

    async def __aenter__(self) -> Embedder:
        slot = self._registry.admit(self._name)
        if slot.embedder is None:
            try:
                await self._registry.ensure_loaded(slot, self._deadline)
            except BaseException:
                self._registry.release(slot)
                raise
        self._slot = slot
        assert slot.embedder is not None, "a model in use is never unloaded"
        return slot.embedder

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._slot is not None:
            self._registry.release(self._slot)


class ModelRegistry:
    """
    Models by name. The first of *specs* is the default; *open_model* loads and starts one, in threads of its own.

    One model is loaded at a time, and those who wait for it share the load: a caller that gives up does not stop it.
    Weights stay within *memory_bytes* (0: no limit), where *estimate_bytes* says beforehand what a model will take:
    models that are pinned or in use stay, of the others the least recently used goes first.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        open_model: Callable[[ModelSpec], Awaitable[Embedder]],
        *,
        observer: RegistryObserver,
        estimate_bytes: Callable[[ModelSpec], int] = lambda _spec: 0,
        memory_bytes: int = 0,
        idle_unload_s: float = 0.0,
        pin_default: bool = True,
        max_concurrent_requests: int = 2048,
    ) -> None:
        self._open_model = open_model
        self._observer = observer
        self._estimate_bytes = estimate_bytes
        self._memory_bytes = memory_bytes
        self._idle_unload_s = idle_unload_s
        self._max_concurrent_requests = max_concurrent_requests
        self._in_use = 0
        self._slots = [_Slot(spec, spec.pinned or (pin_default and not index)) for index, spec in enumerate(specs)]
        self._by_name = _by_name(self._slots)
        self.default = specs[0].public_name
        self._lock = asyncio.Lock()  # Whoever loads or unloads holds it.
        self._released = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None

    def names(self) -> list[str]:
        """Return what each model is called, the default first."""
        return [slot.spec.public_name for slot in self._slots]

    @property
    def aliases(self) -> dict[str, list[str]]:
        """The other names of each model."""
        return {slot.spec.public_name: slot.names for slot in self._slots}

    def loaded(self) -> Sequence[Embedder]:
        """Return the models in memory."""
        return [slot.embedder for slot in self._slots if slot.embedder is not None]

    def resident_bytes(self) -> int:
        """Return what the weights in memory take."""
        return sum(site.backend.info.weights_bytes for one in self.loaded() for site in one.placement.sites)

    def problems(self) -> list[str]:
        """Return why this process should be replaced."""
        return [f"{one.info.name}: {problem}" for one in self.loaded() for problem in one.problems()]

    def use(self, name: str | None, deadline: Deadline = NO_DEADLINE) -> AbstractAsyncContextManager[Embedder]:
        """
        Hold the model *name* (None: the default) while a request works with it; it is loaded first if need be.

        Raises:
            NotFound: There is no such model; the message names those there are.
            Overloaded: Too many requests are under way.
            Unavailable: It cannot be loaded, or there is no room for it now.
            DeadlineExceeded: It was not loaded before *deadline*; the load goes on.
        """
        return _Use(self, name, deadline)

    async def start(self) -> None:
        """Load the pinned models. Raises what loading raises: a service without its model does not start."""
        for slot in self._slots:
            if slot.pinned:
                await self._load(slot)
        if self._idle_unload_s:
            self._sweeper = asyncio.create_task(self._sweep())

    async def aclose(self) -> None:
        """Unload everything."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        loading = [slot.loading for slot in self._slots if slot.loading is not None]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        for slot in self._slots:
            if slot.embedder is not None:
                await slot.embedder.aclose()
                slot.embedder = None

    # --- what `use` does -----------------------------------------------------------------------------------------

    def admit(self, name: str | None) -> _Slot:
        """Count one more user of model *name* and return its slot. Raises as `use`."""
        slot = self._slots[0] if name is None else self._by_name.get(name)
        if slot is None:
            there = ", ".join(self.names())
            raise NotFound(f"There is no model {str(name)[:100]!r}; there is: {there}", param="model")
        if self._in_use >= self._max_concurrent_requests:
            raise Overloaded(f"{self._in_use:,} requests are under way, the most allowed; retry in a moment")
        self._in_use += 1
        slot.users += 1
        return slot

    def release(self, slot: _Slot) -> None:
        """Count one user of *slot* less."""
        self._in_use -= 1
        slot.users -= 1
        slot.used_at = time.monotonic()
        if not slot.users:
            self._released.set()

    async def ensure_loaded(self, slot: _Slot, deadline: Deadline) -> None:
        """Wait until *slot* is loaded. Raises Unavailable when it cannot be; it is tried again no sooner than a while later."""
        if slot.loading is None:
            wait_s = RETRY_LOAD_AFTER_S - (time.monotonic() - slot.failed_at)
            if slot.failure is not None and wait_s > 0:
                raise Unavailable(slot.failure.message, param="model", retry_after_s=wait_s)
            slot.loading = asyncio.create_task(self._load_and_note(slot))
        done, _ = await asyncio.wait([slot.loading], timeout=None if deadline.at == inf else deadline.remaining_s())
        if not done:
            raise DeadlineExceeded(f"The model {slot.spec.public_name} was not loaded in the time allowed")
        if slot.failure is not None:
            raise Unavailable(slot.failure.message, param="model", retry_after_s=RETRY_LOAD_AFTER_S)
        if slot.embedder is None:
            raise NotReady("The service is stopping")

    async def _load_and_note(self, slot: _Slot) -> None:
        try:
            await self._load(slot)
        except Exception as error:
            name = slot.spec.public_name
            log.error("model_load_failed", model=name, exc_info=error)
            slot.failure = Unavailable(f"The model {name} cannot be loaded: {error}")
            slot.failed_at = time.monotonic()
        finally:
            slot.loading = None

    async def _load(self, slot: _Slot) -> None:
        async with self._lock:
            started = time.monotonic()
            needed = await asyncio.to_thread(self._estimate_bytes, slot.spec)
            await self._make_room(needed, slot)
            try:
                slot.embedder = await self._open_model(slot.spec)
            except (TercetError, ModelNotFound):
                self._observer.load_failed()
                raise
            except Exception as error:
                self._observer.load_failed()
                raise Unavailable(f"{type(error).__name__}: {error}") from error
            slot.failure = None
            slot.used_at = time.monotonic()
            self._observer.loaded(slot.used_at - started)
            log.info("model_loaded", model=slot.spec.public_name, seconds=round(slot.used_at - started, 1))
            await self._make_room(0, slot, patient=False)

    async def _make_room(self, needed: int, keep: _Slot, *, patient: bool = True) -> None:
        """Unload idle models, least recently used first, until *needed* bytes fit in the budget."""
        if not self._memory_bytes:
            return
        give_up_at = time.monotonic() + (WAIT_FOR_ROOM_S if patient else 0)
        while self.resident_bytes() + needed > self._memory_bytes:
            removable = [
                slot for slot in self._slots if slot.embedder is not None and not slot.pinned and slot is not keep
            ]
            idle = sorted((slot for slot in removable if slot.idle), key=lambda slot: slot.used_at)
            if idle:
                await self._unload(idle[0], "memory")
                continue
            left_s = give_up_at - time.monotonic()
            if not removable or left_s <= 0:
                if patient:
                    raise Unavailable(
                        f"there is no room: it takes about {needed:,} bytes, {self.resident_bytes():,} of the "
                        f"{self._memory_bytes:,} allowed are taken by models that are pinned or in use"
                    )
                return
            self._released.clear()
            try:
                await asyncio.wait_for(self._released.wait(), left_s)
            except TimeoutError:
                continue

    async def _unload(self, slot: _Slot, reason: str) -> None:
        embedder, slot.embedder = slot.embedder, None
        assert embedder is not None
        await embedder.aclose()
        self._observer.unloaded(reason)
        log.info("model_unloaded", model=slot.spec.public_name, reason=reason)

    async def unload_idle(self) -> None:
        """Unload what nobody has used for `idle_unload_s`, except what is pinned."""
        async with self._lock:
            before = time.monotonic() - self._idle_unload_s
            for slot in self._slots:
                if slot.idle and not slot.pinned and slot.used_at <= before:
                    await self._unload(slot, "idle")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_EVERY_S, self._idle_unload_s / 4))
            try:
                await self.unload_idle()
            except Exception as error:
                log.error("idle_unload_failed", exc_info=error)


def _by_name(slots: Sequence[_Slot]) -> dict[str, _Slot]:
    """Return every name that leads to one model only: what it is called, what it is, and the part after the slash."""
    found = {slot.spec.public_name: slot for slot in slots}
    for names in ([slot.spec.name for slot in slots], [slot.spec.short_name for slot in slots]):
        for slot, name in zip(slots, names, strict=True):
            if names.count(name) == 1 and name not in found:
                found[name] = slot
                slot.names.append(name)
    return found
