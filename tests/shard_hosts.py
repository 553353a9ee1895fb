"""What the tests of hosts and routers share: a ledger, shards and hosts that are dictionaries and fail on command."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.common.deadline import Deadline
from services.common.errors import NotFound, NotReady, Unavailable
from services.search.ports import (
    AuditReport,
    Candidate,
    Collection,
    CollectionState,
    LedgerDocument,
    LexicalStatistics,
    Match,
    Operation,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards.slices import shard_of

BOOKS = Collection("uuid-books", "books", None, "fp", 2, 4, 0.0)
FILMS = Collection("uuid-films", "films", None, "fp", 2, 2, 0.0)


def soon(seconds: float = 5.0) -> Deadline:
    return Deadline.after(seconds)


def many(count: int, text: str = "word") -> dict[str, str]:
    return {f"d{n}": text for n in range(count)}


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds; fail if it never does."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("It never came about")


def make_document(id_: str, text: str) -> LedgerDocument:
    """Return a document with a vector that says how long its text is."""
    return LedgerDocument(id_, text, None, {}, np.array([1.0, len(text)], dtype=np.float32), b"", b"")


class MemoryLedger:
    """
    The parts of a ledger that hosts use.

    *down* makes them raise, *deaf* lets announcements get lost, *restore* sets it back to an earlier operation.
    """

    def __init__(self, *collections: Collection, exclusive: bool = True) -> None:
        self.collections = list(collections)
        self.log: dict[str, list[Operation]] = {collection.uuid: [] for collection in collections}
        self.trimmed: Counter[str] = Counter()
        self.epoch = "epoch-0"
        self.ended: dict[str, dict[str, int]] = {}
        self.exclusive = exclusive
        self.down = False
        self.deaf = False
        self.heard: dict[str, int] = {}
        self.reads = 0
        self.read_after: list[int] = []
        self.news = asyncio.Event()

    def seq(self, uuid: str) -> int:
        return self.log[uuid][-1].seq if self.log[uuid] else 0

    def write(self, collection: Collection, **texts: str | None) -> int:
        """Append an operation for each of *texts*, a deletion where it is None; return the last number."""
        log = self.log[collection.uuid]
        for id_, text in texts.items():
            document = None if text is None else make_document(id_, text)
            log.append(Operation(self.seq(collection.uuid) + 1, id_, document))
        if not self.deaf:
            self.news.set()
        return self.seq(collection.uuid)

    def restore(self, collection: Collection, seq: int) -> None:
        """Begin another epoch, in which the log goes on after *seq*."""
        log = self.log[collection.uuid]
        self.log[collection.uuid] = [operation for operation in log if operation.seq <= seq]
        self.ended[self.epoch] = {uuid: self.seq(uuid) for uuid in self.log}
        self.epoch = f"epoch-{len(self.ended)}"

    def create(self, collection: Collection) -> None:
        self.collections.append(collection)
        self.log[collection.uuid] = []

    def remove(self, collection: Collection) -> None:
        self.collections.remove(collection)
        del self.log[collection.uuid]

    async def list_collections(self) -> list[Collection]:
        self._check()
        return list(self.collections)

    async def state(self, uuid: str) -> CollectionState:
        self._check()
        if uuid not in self.log:
            raise NotFound("It was deleted")
        self.heard[uuid] = self.seq(uuid)
        return CollectionState(self.seq(uuid), 0, self.trimmed[uuid])

    async def shares_history(self, uuid: str, epoch: str, seq: int) -> bool:
        self._check()
        if epoch == self.epoch:
            return seq <= self.seq(uuid)
        return epoch in self.ended and seq <= self.ended[epoch].get(uuid, 0)

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        self._check()
        self.reads += 1
        self.read_after.append(seq)
        last = {operation.id: operation.seq for operation in self.log[uuid]}
        return [
            operation
            for operation in self.log[uuid]
            if operation.seq > seq
            and last[operation.id] == operation.seq
            and (operation.document is not None or operation.seq > self.trimmed[uuid])
        ][:limit]

    def heard_seq(self, uuid: str) -> int:
        if self.deaf:
            return self.heard.get(uuid, 0)
        return self.seq(uuid) if uuid in self.log else 0

    def heard_collections(self) -> set[str]:
        return {uuid for uuid in self.log if self.heard_seq(uuid)}

    async def wait_for_news(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.news.wait()
        except TimeoutError:
            return
        self.news.clear()

    async def trim(self, uuid: str, seq: int) -> int:
        self.trimmed[uuid] = max(self.trimmed[uuid], seq)
        return 1

    def _check(self) -> None:
        if self.down:
            raise Unavailable("The ledger is away")


@dataclass(frozen=True)
class Origin:
    epoch: str
    seq: int


@dataclass
class DictionaryShard:
    """A faithful shard. Set an `Event` to hold a method up, an error to make it fail."""

    number: int
    applied_seq: int = 0
    live: dict[str, tuple[int, LedgerDocument]] = field(default_factory=dict)
    origin: Origin | None = None
    problems: list[str] = field(default_factory=list)
    kept: dict[int, "Kept"] = field(default_factory=dict)
    applied_at: list[float] = field(default_factory=list)
    apply_error: Exception | None = None
    search_error: Exception | None = None
    snapshot_error: Exception | None = None
    apply_gate: asyncio.Event | None = None
    search_gate: asyncio.Event | None = None
    to_maintain: int = 0
    maintain_s: float = 0.0
    snapshots: int = 0
    searching: int = 0
    closed: bool = False

    @property
    def documents(self) -> int:
        return len(self.live)

    def standing(self) -> ShardStanding:
        return ShardStanding(self.number, self.applied_seq, len(self.live), memory_bytes=10, segments={"flat": 3})

    async def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        assert not self.closed
        self.applied_at.append(time.monotonic())
        if self.apply_gate:
            await self.apply_gate.wait()
        if self.apply_error:
            raise self.apply_error
        for operation in operations:
            assert self.applied_seq < operation.seq <= applied_seq
            self.live.pop(operation.id, None)
            if operation.document is not None:
                self.live[operation.id] = (operation.seq, operation.document)
        self.applied_seq = applied_seq

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        texts = [document.text.split() for _, document in self.live.values()]
        return LexicalStatistics(len(texts), {term: sum(term in text for text in texts) for term in terms})

    async def search(self, query: ShardQuery) -> ShardAnswer:
        if self.closed:
            raise NotReady("closed")
        self.searching += 1
        try:
            if self.search_gate:
                await self.search_gate.wait()
            if self.search_error:
                raise self.search_error
        finally:
            self.searching -= 1
        found = [
            Candidate(id_, self.number, seq, None, 1.0)
            for id_, (seq, document) in self.live.items()
            if set(query.terms) & set(document.text.split())
        ]
        return ShardAnswer(self.number, self.applied_seq, found[: query.limit], {"lexical": float(self.number)})

    async def fetch(self, ids: Sequence[str], *, vectors: bool = False) -> dict[str, ShardDocument]:
        return {
            id_: ShardDocument(id_, self.live[id_][1].text, None, {}, None, self.live[id_][0])
            for id_ in ids
            if id_ in self.live
        }

    async def matching(self, filter: object, *, limit: int) -> list[Match]:
        return [Match(id_, seq) for id_, (seq, _) in self.live.items()][:limit]

    async def maintain(self, *, idle: bool) -> bool:
        self.to_maintain -= 1
        if self.to_maintain >= 0:
            await asyncio.sleep(self.maintain_s)
        return self.to_maintain >= 0

    @property
    def changed(self) -> bool:
        """Whether anything was applied since the last snapshot."""
        kept = self.kept.get(self.number)
        return self.applied_seq > 0 and (kept is None or kept.origin.seq != self.applied_seq)

    async def snapshot(self, epoch: str) -> int:
        if self.snapshot_error:
            raise self.snapshot_error
        self.snapshots += 1
        self.kept[self.number] = Kept(Origin(epoch, self.applied_seq), dict(self.live))
        return self.applied_seq

    async def audit(self, pages: object, *, repair: bool) -> AuditReport:
        return AuditReport(self.number, self.applied_seq, len(self.live), {})

    async def aclose(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Kept:
    """A snapshot."""

    origin: Origin
    live: dict[str, tuple[int, LedgerDocument]]


class MemoryDirectory:
    """Opens shards and remembers them; *refuse* says which cannot be opened, *prepare* is told of each."""

    def __init__(self) -> None:
        self.opened: dict[tuple[str, int], DictionaryShard] = {}
        self.kept: dict[str, dict[int, Kept]] = {}
        self.openings: list[tuple[str, int, bool]] = []
        self.prepare: Callable[[DictionaryShard], None] = lambda shard: None
        self.refuse: set[int] = set()
        self.removed: list[str] = []
        self.hurried = False

    def open(self, collection: Collection, number: int, use_snapshots: bool) -> DictionaryShard:
        self.openings.append((collection.name, number, use_snapshots))
        if number in self.refuse:
            raise OSError("the file is broken")
        shards = self.kept.setdefault(collection.uuid, {})
        shard = DictionaryShard(number, kept=shards)
        if use_snapshots and number in shards:
            shard.origin = shards[number].origin
            shard.applied_seq, shard.live = shard.origin.seq, dict(shards[number].live)
        self.opened[collection.uuid, number] = shard
        self.prepare(shard)
        return shard

    def of(self, collection: Collection) -> list[DictionaryShard]:
        return [self.opened[collection.uuid, number] for number in range(collection.shards)]

    def standing(self, collection: Collection, number: int) -> ShardStanding | None:
        found = self.kept.get(collection.uuid, {}).get(number)
        return ShardStanding(number, found.origin.seq, len(found.live)) if found else None

    def uuids(self) -> list[str]:
        return list(self.kept)

    def remove(self, uuid: str) -> None:
        self.kept.pop(uuid, None)
        self.removed.append(uuid)

    def hurry(self) -> None:
        self.hurried = True


@dataclass
class FakeHost:
    """A host whose shards have one document for each operation up to *applied*; set an error, a gate or verbs to hurt it."""

    name: str
    applied: int = 10
    catching_up: bool = False
    lexical_failed: bool = False
    error: Exception | None = None
    gate: asyncio.Event | None = None
    fails: set[int] = field(default_factory=set)
    hangs: set[str] = field(default_factory=set)
    hangs_on: set[tuple[str, int]] = field(default_factory=set)
    asked: list[tuple[str, int]] = field(default_factory=list)
    queries: list[ShardQuery] = field(default_factory=list)
    notified: list[int] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    running: int = 0

    async def _enter(self, verb: str, shard: int) -> None:
        self.asked.append((verb, shard))
        self.running += 1
        try:
            if verb in self.hangs or (verb, shard) in self.hangs_on:
                await asyncio.Event().wait()
            if self.gate:
                await self.gate.wait()
            if self.error and (not self.fails or shard in self.fails):
                raise self.error
        finally:
            self.running -= 1

    def _ids(self, collection: Collection, shard: int) -> list[str]:
        ids = [f"d{number}" for number in range(1, self.applied + 1)]
        return [id_ for id_ in ids if shard_of(id_, collection.shards) == shard]

    async def statistics(self, collection, shard, terms, deadline) -> LexicalStatistics:
        await self._enter("statistics", shard)
        return LexicalStatistics(len(self._ids(collection, shard)), dict.fromkeys(terms, 1))

    async def search(self, collection, shard, query, deadline) -> ShardAnswer:
        self.queries.append(query)
        await self._enter("search", shard)
        found = [Candidate(id_, shard, 0, None, 1.0) for id_ in self._ids(collection, shard)]
        plan = {"host": self.name} if query.explain else None
        facets = {name: {"en": 2, "de": shard} for name in query.facets}
        return ShardAnswer(
            shard,
            self.applied,
            found[: query.limit],
            {"lexical": float(shard)},
            plan,
            facets,
            self.catching_up,
            lexical_failed=self.lexical_failed,
        )

    async def fetch(self, collection, shard, ids, deadline, *, vectors=False) -> dict[str, ShardDocument]:
        await self._enter("fetch", shard)
        held = set(self._ids(collection, shard))
        return {id_: ShardDocument(id_, f"from {self.name}", None, {}) for id_ in ids if id_ in held}

    async def matching(self, collection, shard, filter, deadline, *, limit) -> list[Match]:
        await self._enter("matching", shard)
        return [Match(id_, 1) for id_ in self._ids(collection, shard)][:limit]

    async def wait_applied(self, collection, shard, seq, deadline) -> bool:
        await self._enter("wait_applied", shard)
        while self.applied < seq:
            if deadline.passed:
                return False
            await asyncio.sleep(0.005)
        return True

    async def standings(self, collection, deadline) -> list[ShardStanding]:
        await self._enter("standings", -1)
        return [ShardStanding(shard, self.applied, 1) for shard in range(collection.shards)]

    async def audit(self, collection, shard, deadline, *, repair) -> AuditReport:
        await self._enter("audit", shard)
        return AuditReport(shard, self.applied, 1, {})

    async def snapshot(self, collection, shard, deadline) -> int:
        await self._enter("snapshot", shard)
        return self.applied

    def notify(self, collection, seq) -> None:
        self.notified.append(seq)

    async def forget(self, collection) -> None:
        await self._enter("forget", -1)
        self.forgotten.append(collection.uuid)

    async def aclose(self) -> None:
        return None
