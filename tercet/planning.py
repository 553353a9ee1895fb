"""
What a number of documents takes: memory, disk, shards, nodes and time, computed.

docs/sizing.md states the formulas in words; the constants are what `python -m benchmarks.sizing` measured, and a test
holds the formulas to such a measurement.
"""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

IndexKind = Literal["flat", "hnsw", "ivf"]

# The search service's defaults: a test compares them.
TAIL_ROWS = 4096
HNSW_ROWS = 16_384
IVF_ROWS = 2_000_000
MAINTENANCE_SHARE = 0.5
MAX_SHARDS = 256
MIN_SHARDS = 2

# Beyond this a graph is slow to build (hours after a bulk load), and its search is one thread's work.
ROWS_FOR_A_SHARD = 1_000_000

ID_BYTES = 16
FIELD_BYTES = 21  # a metadata field as JSON: its name, its value, quotes and a comma
LEDGER_PAGE, STORE_PAGE = 8192, 4096
LEDGER_ROW_BYTES = 55  # hashes, keys, lengths
STORE_ROW_BYTES = 20
ID_INDEX_BYTES = 18  # beside the id, for an entry in the index of ids
GRAPH_LINK_BYTES = 144  # 32 links of 4 bytes on the lowest layer, and what the layers above and the offsets take
LIST_ENTRY_BYTES = 8
WORDS_BASE_BYTES, WORDS_SHARE = 20, 0.32
DICTIONARY_BYTES = 300_000  # of 30,000 different words
SNAPSHOT_ROW_BYTES = 10
SNAPSHOT_FIELD_BYTES = 6.5
KEPT_SNAPSHOTS = 2

ANONYMOUS_ROW_BYTES = 50
ANONYMOUS_FIELD_BYTES = 12
OPEN_SHARD_BYTES = 2_500_000
WRITTEN_SHARD_BYTES = 27_000_000  # what a shard that is written to has besides: SQLite's page cache, Tantivy's writer
UNFOLDED_ROWS, UNFOLDED_ROW_BYTES, UNFOLDED_SHARE = 16_384, 1600, 0.64  # the newest words, not yet in the files
PROCESS_BYTES = 120_000_000

GRAPH_ROWS_PER_S = 6_000  # 100k rows of 384 dimensions, one thread
LIST_FLOPS = 5e10  # assigning rows to lists: computed, not measured
WORDS_BYTES_PER_S = 9e6
NODE_SHARE = 0.9  # of a node's memory; the rest is the system's


class PlanningError(Exception):
    """What was asked for cannot be planned; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be stored: *documents* of *text_bytes* in the mean, with vectors of *dim* and *metadata_fields*."""

    documents: int
    dim: int
    text_bytes: int = 1000
    metadata_fields: int = 5


@dataclass(frozen=True, slots=True)
class ShardSize:
    """
    One shard, in bytes. *texts* (the store), *vectors*, *index*, *words* and *snapshots* are on disk.

    *anonymous* is memory of the process, *building* what it takes besides while the index is built.
    """

    rows: int
    kind: IndexKind
    texts: float
    vectors: float
    index: float
    words: float
    snapshots: float
    anonymous: float
    building: float
    build_s: float

    @property
    def disk(self) -> float:
        """All of it, with room to write the vectors' and the words' files anew beside the old ones."""
        return self.texts + self.snapshots + 2 * (self.vectors + self.index + self.words)

    @property
    def least_cache(self) -> float:
        """Files that every search reads: the index (or the vectors, where all are compared) and the words."""
        return self.words + (self.vectors if self.kind == "flat" else self.index)

    @property
    def comfortable_cache(self) -> float:
        """Those, and the vectors that rescore what was found: then no search waits for the disk."""
        return self.words + self.vectors + self.index


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it: *nodes* that divide the shards among themselves, each in *replicas* copies; bytes are of one replica."""

    workload: Workload
    shards: int
    replicas: int
    nodes: int
    shard: ShardSize
    ledger: float

    @property
    def shards_on_a_node(self) -> int:
        """How many the fullest node has."""
        return ceil(self.shards / self.nodes)

    @property
    def node_memory(self) -> float:
        """What the fullest node takes in all, to be comfortable."""
        return node_memory(self.shard, self.shards_on_a_node)

    @property
    def node_disk(self) -> float:
        """What the fullest node's shards take on disk."""
        return self.shards_on_a_node * self.shard.disk

    @property
    def build_s(self) -> float:
        """How long the fullest node builds indexes after all documents came at once."""
        return self.shards_on_a_node * self.shard.build_s


def plan(workload: Workload, *, shards: int | None = None, replicas: int = 1, memory_per_node: float = 8e9) -> Plan:
    """
    Return what *workload* takes, on as few nodes of *memory_per_node* bytes as hold it comfortably.

    Without *shards* there are as many as keep a shard small enough to be built and to fit a node.

    Raises:
        PlanningError: One of the shards alone does not fit a node.
    """
    most = MAX_SHARDS if shards is None else shards
    count = shards or min(MAX_SHARDS, max(MIN_SHARDS, ceil(workload.documents / ROWS_FOR_A_SHARD)))
    room = memory_per_node * NODE_SHARE
    while node_memory(size_of_shard(workload, count), 1) > room:
        if count >= most:
            needed = node_memory(size_of_shard(workload, count), 1) / NODE_SHARE
            raise PlanningError(
                f"one of {count} shards needs a node of {needed / 1e9:.1f} GB: allow for more memory or more shards"
            )
        count = min(most, 2 * count)
    shard = size_of_shard(workload, count)
    nodes = next(n for n in range(1, count + 1) if node_memory(shard, ceil(count / n)) <= room)
    return Plan(workload, count, replicas, nodes, shard, ledger_bytes(workload))


def node_memory(shard: ShardSize, shards: int) -> float:
    """Return what a process with so many shards takes: its own memory, one index being built, and the files."""
    return PROCESS_BYTES + shards * (shard.anonymous + shard.comfortable_cache) + shard.building


def kind_of(rows: int) -> IndexKind:
    """Return which index that many rows get."""
    if rows < HNSW_ROWS:
        return "flat"
    return "hnsw" if rows < IVF_ROWS else "ivf"


def ledger_bytes(workload: Workload) -> float:
    """Return the size of the ledger: text, vector, metadata and hashes, in SQLite's pages."""
    row = _fields_bytes(workload) + workload.text_bytes + 4 * workload.dim + ID_BYTES + LEDGER_ROW_BYTES
    return workload.documents * (_paged(row, LEDGER_PAGE) + ID_BYTES + ID_INDEX_BYTES)


def size_of_shard(workload: Workload, shards: int) -> ShardSize:
    """Return the size of one of so many shards."""
    rows = ceil(workload.documents / shards)
    kind = kind_of(rows)
    stored = workload.text_bytes + _fields_bytes(workload) + ID_BYTES + STORE_ROW_BYTES
    index = rows * _index_row_bytes(kind, workload.dim) + (_lists(rows) * 4 * workload.dim if kind == "ivf" else 0)
    unfolded = min(rows, UNFOLDED_ROWS) * (UNFOLDED_ROW_BYTES + UNFOLDED_SHARE * workload.text_bytes)
    open_bytes = open_shard_bytes(rows, workload.dim, workload.metadata_fields)
    return ShardSize(
        rows=rows,
        kind=kind,
        texts=rows * (_paged(stored, STORE_PAGE) + ID_BYTES + ID_INDEX_BYTES),
        vectors=rows * 4 * workload.dim,
        index=index,
        words=DICTIONARY_BYTES + rows * words_row_bytes(workload.text_bytes),
        snapshots=KEPT_SNAPSHOTS * rows * snapshot_row_bytes(workload.metadata_fields),
        anonymous=open_bytes + WRITTEN_SHARD_BYTES + unfolded,
        building=index,
        build_s=_build_s(rows, kind, workload),
    )


def open_shard_bytes(rows: int, dim: int, metadata_fields: int) -> float:
    """Return the memory of the process that an open shard takes: ids, metadata, and the newest vectors."""
    row = ID_BYTES + ANONYMOUS_ROW_BYTES + metadata_fields * ANONYMOUS_FIELD_BYTES
    return OPEN_SHARD_BYTES + rows * row + min(rows, TAIL_ROWS) * 4 * dim


def words_row_bytes(text_bytes: int) -> float:
    """Return what the index of words has of one text."""
    return WORDS_BASE_BYTES + WORDS_SHARE * text_bytes


def snapshot_row_bytes(metadata_fields: int) -> float:
    """Return what one snapshot has of its own for a row; vectors and words are the shard's files under other names."""
    return ID_BYTES + SNAPSHOT_ROW_BYTES + metadata_fields * SNAPSHOT_FIELD_BYTES


def graph_rows_per_s(rows: int, dim: int) -> float:
    """Return how many rows one thread puts into a graph of *rows* in a second, in the mean."""
    return float(GRAPH_ROWS_PER_S * (rows / 100_000) ** -0.3 * (384 / dim) ** 0.35)


def _index_row_bytes(kind: IndexKind, dim: int) -> int:
    if kind == "flat":
        return 0
    return dim + (GRAPH_LINK_BYTES if kind == "hnsw" else LIST_ENTRY_BYTES)


def _lists(rows: int) -> float:
    return 2 * sqrt(rows)


def _fields_bytes(workload: Workload) -> int:
    return 2 + workload.metadata_fields * FIELD_BYTES


def _paged(row_bytes: float, page_bytes: int) -> float:
    """Return what a row of varying length takes: the end of a page, or of a chain of them, stays empty."""
    most = page_bytes / 3
    return row_bytes + (min(row_bytes**2 / (2 * page_bytes - row_bytes), most) if row_bytes < page_bytes else most)


def _build_s(rows: int, kind: IndexKind, workload: Workload) -> float:
    words_s = rows * workload.text_bytes / WORDS_BYTES_PER_S
    index_s = 0.0
    if kind == "hnsw":
        index_s = rows / graph_rows_per_s(rows, workload.dim)
    elif kind == "ivf":
        index_s = rows * _lists(rows) * 2 * workload.dim / LIST_FLOPS
    return (words_s + index_s) / MAINTENANCE_SHARE
