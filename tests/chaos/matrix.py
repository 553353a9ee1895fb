"""
The matrix as data: which part fails how, in which surroundings, what the replies must then say, and what they must equal.

A cell's replies under the fault bear exactly one of its sets of flags. More than one set is possible only where time
decides: a silent part costs the first callers their share of the time (`…_late`) until its breaker opens
(`…_unavailable`), and each probe of the half-open breaker again.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Shards = Literal["embedded", "remote"]
Flags = frozenset[str]

UNRESOLVED: Final = "unresolved"  # The part's name cannot be resolved, from the start of the search process on.
# These faults leave the caller waiting until its time is up; the others it knows at once.
SILENT: Final = ("frozen", "slow", "drip")
FAULTS: Final = ("killed", "frozen", "slow", "garbage", "reset")
HTTP_FAULTS: Final = ("raw bytes", "100 MB", "drip", UNRESOLVED)


@dataclass(frozen=True, slots=True)
class Oracle:
    """
    How to learn the hits that a step down must give, of parts that are well.

    *router* names a search process that has only what is left (see Deployment.oracle; None: the one under test), *request*
    what is asked differently.
    """

    router: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    def joined(self, other: "Oracle") -> "Oracle":
        """Return the oracle for both steps at once."""
        return Oracle(self.router or other.router, {**self.request, **other.request})


@dataclass(frozen=True, slots=True)
class Effect:
    """What the loss of a part does: the flag where the loss is loud, the other flag where it is silent, and the oracle."""

    loud: str | None = None
    late: str | None = None
    oracle: Oracle = Oracle()
    shards: tuple[Shards, ...] = ("embedded", "remote")
    redis: tuple[bool, ...] = (True, False)
    coverage: float = 1.0

    def flags(self, fault: str) -> tuple[Flags, ...]:
        """Return the sets of flags of which each reply bears one."""
        known: Flags = frozenset({self.loud}) if self.loud else frozenset()
        if fault in SILENT and self.late is not None:
            return (known, frozenset({self.late}))
        return (known,)


_NODES: Final[tuple[Shards, ...]] = ("remote",)

EFFECTS: Final[Mapping[tuple[str, ...], Effect]] = {
    ("embedding",): Effect("embedding_unavailable", "embedding_late", Oracle(request={"mode": "lexical"})),
    ("rerank",): Effect("rerank_unavailable", "rerank_late", Oracle(request={"rerank": False})),
    ("replica",): Effect(shards=_NODES),
    ("node 1",): Effect("fallback_index", oracle=Oracle("fallback of 1"), shards=_NODES),
    ("redis",): Effect("cache_unavailable", redis=(True,)),
    ("ledger",): Effect(),
    # Two parts of one step.
    ("node 0", "replica"): Effect("fallback_index", oracle=Oracle("fallback of 0"), shards=_NODES),
    ("node 1", "fallback"): Effect("shards_partial", oracle=Oracle("without 1"), shards=_NODES, coverage=0.5),
}

# Pairs whose steps meet: both change the list that is ranked, both order it, both are asked for what is kept.
PAIRS: Final = (
    ("embedding", "node 1"),
    ("embedding", "rerank"),
    ("rerank", "node 1"),
    ("embedding", "redis"),
    ("redis", "ledger"),
    ("embedding", "ledger"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the matrix."""

    parts: tuple[str, ...]
    fault: str
    shards: Shards
    redis: bool
    flags: tuple[Flags, ...]
    oracle: Oracle
    coverage: float = 1.0

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{' + '.join(self.parts)} {self.fault}, {self.shards}, {'with' if self.redis else 'without'} Redis"

    @property
    def about_the_cache(self) -> bool:
        """Whether its searches use the result cache: otherwise they pass it by."""
        return "redis" in self.parts

    @property
    def recovering(self) -> Flags:
        """
        Flags that may show, besides, while the parts come back.

        A follower that lost the ledger knows that it may be behind until it has asked; a service that has just started
        may be late; and where a node and what stands in for it are both gone, either may be back first. Processes that
        start take a good part of the two cores, which is pressure.
        """
        back = set(self.parts) & {"ledger", "node 0", "node 1", "replica", "fallback"}
        flags = {"catching_up"} if back else set()
        flags |= {late for part in self.parts if (part,) in EFFECTS and (late := EFFECTS[(part,)].late) is not None}
        flags |= {"fallback_index"} if "fallback" in self.parts else set()
        return frozenset(flags | ({"rerank_reduced"} if self.fault == "killed" else set()))


def cell(parts: tuple[str, ...], fault: str, shards: Shards, redis: bool) -> Cell:
    """Return the cell of parts that fail together, each in its own step or all in one."""
    effects = [EFFECTS[parts]] if parts in EFFECTS else [EFFECTS[(part,)] for part in parts]
    oracle = Oracle()
    for effect in effects:
        oracle = oracle.joined(effect.oracle)
    sets = [frozenset().union(*chosen) for chosen in itertools.product(*(effect.flags(fault) for effect in effects))]
    return Cell(parts, fault, shards, redis, tuple(sets), oracle, min(effect.coverage for effect in effects))


def whole() -> Iterator[Cell]:
    """Yield every cell, those with the same surroundings side by side."""
    single = [((part,), fault) for part in _singles() for fault in (*FAULTS, *_more(part))]
    pairs = [(parts, fault) for parts in (*_shared(), *PAIRS) for fault in ("killed", "frozen")]
    for redis in (False, True):
        for shards in ("embedded", "remote"):
            for parts, fault in (*single, *pairs):
                if _exists(parts, shards, redis):
                    yield cell(parts, fault, shards, redis)


def short() -> Iterator[Cell]:
    """Yield each part with each fault that is its own kind of trouble, and each of the surroundings, in few cells."""
    chosen: Sequence[tuple[tuple[str, ...], str, Shards, bool]] = (
        (("embedding",), "killed", "embedded", True),
        (("embedding",), "garbage", "embedded", True),
        (("rerank",), "frozen", "embedded", True),
        (("redis",), "killed", "embedded", True),
        (("redis",), "frozen", "embedded", True),
        (("ledger",), "reset", "embedded", True),
        (("embedding",), "frozen", "remote", True),
        (("rerank",), "100 MB", "remote", True),
        (("rerank",), "slow", "remote", True),
        (("replica",), "frozen", "remote", True),
        (("node 1",), "killed", "remote", True),
        (("node 1",), "slow", "remote", True),
        (("node 1", "fallback"), "killed", "remote", True),
        (("embedding", "node 1"), "killed", "remote", True),
        (("ledger",), "frozen", "remote", True),
        (("redis",), "garbage", "remote", True),
    )
    for parts, fault, shards, redis in chosen:
        yield cell(parts, fault, shards, redis)


def _singles() -> list[str]:
    return [parts[0] for parts in EFFECTS if len(parts) == 1]


def _shared() -> list[tuple[str, ...]]:
    return [parts for parts in EFFECTS if len(parts) > 1]


def _more(part: str) -> tuple[str, ...]:
    return HTTP_FAULTS if part not in ("redis", "ledger") else ()


def _exists(parts: tuple[str, ...], shards: Shards, redis: bool) -> bool:
    effects = [EFFECTS[parts]] if parts in EFFECTS else [EFFECTS[(part,)] for part in parts]
    return all(shards in effect.shards and redis in effect.redis for effect in effects)
