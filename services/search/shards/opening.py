"""Opens a shard from the best snapshot there is, or empty, whatever state its directory is in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from pyroaring import BitMap

from services.search.ports import Collection
from services.search.shards import files
from services.search.shards.attributes import AttributeIndex
from services.search.shards.contents import Parts, ShardContents
from services.search.shards.files import Damaged
from services.search.shards.ids import IdArena
from services.search.shards.lexical import LexicalIndex
from services.search.shards.snapshot import Manifest, Snapshots
from services.search.shards.store import ShardStore, StoreMark
from services.search.shards.vectors import VectorIndex, VectorOptions
from services.search.shards.view import ShardView

VECTORS, LEXICAL = "vectors", "lexical"

_TAIL_PAGE = 500

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotOrigin:
    """Which snapshot a shard was loaded from: the ledger's epoch then, and up to which operation it is true."""

    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class Opened:
    """An open shard, what it was loaded from (None: it is empty), and what was damaged on the way."""

    contents: ShardContents
    snapshots: Snapshots
    origin: SnapshotOrigin | None
    problems: list[str]


def open_shard(
    collection: Collection, number: int, directory: Path, options: VectorOptions, *, use_snapshots: bool
) -> Opened:
    """
    Load the newest good snapshot in *directory*, which the caller holds a claim on; else begin with an empty shard.

    A snapshot that cannot be used is removed. Without *use_snapshots* all are, with everything else that is there.

    Raises:
        Conflict: The snapshots are of a collection with another number of shards.
        OSError, apsw.Error: The directory cannot be written.
    """
    snapshots = Snapshots(directory)
    snapshots.tidy()
    problems: list[str] = []
    for name in snapshots.names() if use_snapshots else ():
        try:
            manifest = snapshots.manifest(name)
            manifest.check(collection, number)
            contents = _load(collection, number, directory, options, snapshots, name, manifest)
        except Damaged as error:
            problems.append(f"snapshot {name}: {error}")
            _log.warning("snapshot_damaged", collection=collection.name, shard=number, snapshot=name, error=str(error))
            snapshots.discard(name)
            continue
        snapshots.adopt(name, manifest)
        _adopt_older(snapshots, name)
        return Opened(contents, snapshots, SnapshotOrigin(manifest.epoch, manifest.seq), problems)
    snapshots.clear()
    return Opened(_empty(collection, number, directory, options), snapshots, None, problems)


def _adopt_older(snapshots: Snapshots, loaded: str) -> None:
    """Keep the files that the other snapshots need; one whose manifest cannot be read is not worth keeping."""
    for name in snapshots.names():
        if name != loaded:
            try:
                snapshots.adopt(name, snapshots.manifest(name))
            except Damaged:
                snapshots.discard(name)


def _empty(collection: Collection, number: int, directory: Path, options: VectorOptions) -> ShardContents:
    for name in (VECTORS, LEXICAL):
        files.remove(directory / name)
        (directory / name).mkdir(parents=True)
    store = ShardStore(directory)
    vectors = VectorIndex(collection.dim, collection.metric, directory / VECTORS, options)
    lexical = LexicalIndex(directory / LEXICAL, collection.language, read=store.texts)
    parts = Parts(store, IdArena(), AttributeIndex(collection.attributes), vectors, lexical)
    return _contents(collection, number, parts, BitMap(), 0)


def _load(
    collection: Collection,
    number: int,
    directory: Path,
    options: VectorOptions,
    snapshots: Snapshots,
    name: str,
    manifest: Manifest,
) -> ShardContents:
    """Return what a snapshot holds. Raises Damaged, whatever is wrong with it."""
    store = None
    try:
        content = snapshots.content(name, manifest)
        ids = IdArena.load(content.ids)
        attributes = AttributeIndex.load(content.attributes, collection.attributes)
        vectors = VectorIndex.load(collection.dim, collection.metric, directory / VECTORS, options, manifest.vectors)
        if len(vectors) != manifest.next_row or len(ids) > manifest.next_row:
            raise Damaged("its parts do not have the same rows")
        mark = StoreMark(manifest.store_token, manifest.store_seq)
        store = ShardStore(directory, expected=mark)
        # A row that the store lacks was replaced after the snapshot: the operation that did it will come again.
        live = content.live & store.rows()
        store.keep_only(live, manifest.next_row, mark)
        _restore_lexical(snapshots.lexical_directory(name), directory / LEXICAL)
        lexical = LexicalIndex.load(directory / LEXICAL, collection.language, manifest.lexical, read=store.texts)
        _add_tail(lexical, store, live, int(manifest.lexical["rows"]))
        parts = Parts(store, ids, attributes, vectors, lexical)
        return _contents(collection, number, parts, live, manifest.seq)
    except Exception as error:
        if store is not None:
            store.close()
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"it cannot be loaded: {type(error).__name__}: {error}") from error


def _restore_lexical(source: Path, target: Path) -> None:
    """Put the words' files of a snapshot where they are worked on, in the place of what is there."""
    files.remove(target)
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        files.hard_link(path, target / path.name)


def _add_tail(lexical: LexicalIndex, store: ShardStore, live: BitMap, first_row: int) -> None:
    """Give the words of the rows that their snapshot has not yet to the index."""
    tail = live & BitMap(range(first_row, max(first_row, live.max() + 1))) if live else live
    for row, title, text in _pages(store, list(tail)):
        lexical.add(row, title, text)
    lexical.commit()


def _pages(store: ShardStore, rows: list[int]) -> Iterable[tuple[int, str | None, str]]:
    for start in range(0, len(rows), _TAIL_PAGE):
        yield from store.texts(rows[start : start + _TAIL_PAGE])


def _contents(collection: Collection, number: int, parts: Parts, live: BitMap, applied_seq: int) -> ShardContents:
    lexical = parts.lexical.commit()
    view = ShardView(number, applied_seq, live, parts.vectors.view(), lexical, parts.ids, parts.attributes)
    return ShardContents(collection, number, parts, view)
