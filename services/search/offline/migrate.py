"""`tercet migrate`: the embedded ledger of a data directory, moved into an empty PostgreSQL ledger."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import apsw

from services.common.errors import Conflict, TercetError
from services.search.claim import Claim
from services.search.ledger import catalogue, whole
from services.search.ledger.connection import connect, explain
from services.search.ledger.encoding import StoredOperation, StoredReceipt
from services.search.ledger.postgres.loading import Loading, Marks, loading, marks_of
from services.search.offline.errors import MigrationError
from services.search.offline.layout import LEDGER, check_no_stack
from services.search.offline.ledger_copy import check_version
from services.search.ports import Collection, CollectionState

_SCHEMES = ("postgresql://", "postgres://")
_NOTE_EVERY = 500
_NAMED = 5

Note = Callable[[str], object]
_Names = list[tuple[Collection, CollectionState]]


@dataclass(frozen=True, slots=True)
class MovedCollection:
    """A collection that is the same in both ledgers: *digest* is of all its operations, live documents and deletions."""

    name: str
    documents: int
    seq: int
    receipts: int
    digest: str


@dataclass(frozen=True, slots=True)
class Migrated:
    """What is in the ledger at *place*; where *already*, it was there before and nothing was written."""

    place: str
    collections: list[MovedCollection]
    aliases: int
    already: bool
    durable: bool


async def migrate(data_dir: Path, to: str, *, note: Note = lambda _: None) -> Migrated:
    """
    Move the SQLite ledger of *data_dir* into the empty PostgreSQL ledger at the URL *to*, and compare both.

    All of it becomes visible there at once, or nothing does, whenever this ends. The SQLite ledger is kept from being
    written meanwhile and stays as it is. A target that holds exactly the same already is left alone. *note* is told what
    is being done.

    Raises:
        OfflineError: There is no such ledger, a service uses it, the target is not empty or cannot be written, or what
            arrived is not what was sent.
    """
    if not to.startswith(_SCHEMES):
        raise MigrationError("The ledger to move to is named by a URL: postgresql://user:password@host/database")
    try:
        with _claimed(data_dir) as source:
            async with loading(to) as target:
                return await _move(source, target, note)
    except TercetError as error:
        raise MigrationError(str(error)) from error
    except apsw.Error as error:
        raise MigrationError(str(explain(error, data_dir / LEDGER))) from error


@contextmanager
def _claimed(data_dir: Path) -> Iterator[apsw.Connection]:
    """Open the ledger of *data_dir* to read it as of one moment, claimed as a service claims it."""
    path = data_dir / LEDGER
    check_no_stack(data_dir, LEDGER)
    if not path.exists():
        raise MigrationError(f"There is no {LEDGER} in {data_dir}: name the data directory of a search service")
    try:
        claim = Claim(path, what="ledger")
    except Conflict as error:
        raise MigrationError(f"{error}. A ledger is moved while no service writes to it") from error
    except OSError as error:
        raise MigrationError(str(explain(error, path))) from error
    try:
        reader = connect(path, readonly=True)
        try:
            check_version(reader, path)
            reader.execute("BEGIN")
            yield reader
        finally:
            reader.close()
    finally:
        claim.release()


async def _move(source: apsw.Connection, target: Loading, note: Note) -> Migrated:
    names, aliases = _names(source), catalogue.aliases(source)
    already = not await target.empty()
    if already and (await target.collections(), await target.aliases()) != (names, aliases):
        raise await _not_empty(target)
    if already:
        marks = {collection.uuid: marks_of(*_rows(source, collection, state, note)) for collection, state in names}
    else:
        marks = await _fill(source, target, names, aliases, note)
    moved = []
    for collection, state in names:
        note(f"comparing {collection.name}")
        operations, receipts = there = await target.marks(collection.uuid)
        if there != marks[collection.uuid]:
            raise await _not_empty(target) if already else _differs(target, repr(collection.name))
        moved.append(MovedCollection(collection.name, state.documents, state.seq, receipts.rows, operations.digest))
    if (await target.collections(), await target.aliases()) != (names, aliases):
        raise _differs(target, "the list of collections and aliases")
    return Migrated(target.place, moved, len(aliases), already, target.durable)


async def _fill(
    source: apsw.Connection, target: Loading, names: _Names, aliases: Mapping[str, str], note: Note
) -> dict[str, Marks]:
    await target.begin_epoch()
    sent = {}
    for collection, state in names:
        sent[collection.uuid] = await target.fill(collection, state, *_rows(source, collection, state, note))
    await target.set_aliases(aliases)
    await target.finish()
    return sent


def _names(source: apsw.Connection) -> _Names:
    return [(collection, catalogue.state(source, collection.uuid)) for collection in catalogue.collections(source)]


def _rows(
    source: apsw.Connection, collection: Collection, state: CollectionState, note: Note
) -> tuple[Iterator[StoredOperation], Iterator[StoredReceipt]]:
    return _counted(source, collection, state, note), whole.receipts(source, collection.uuid)


def _counted(
    source: apsw.Connection, collection: Collection, state: CollectionState, note: Note
) -> Iterator[StoredOperation]:
    """Yield the operations. Raises MigrationError after them where the ledger does not hold what it says it holds."""
    live = last = 0
    note(f"{collection.name}: {state.documents:,} documents")
    for operation in whole.operations(source, collection.uuid):
        yield operation
        last = operation.seq
        live += operation.text is not None
        if live % _NOTE_EVERY == 0:
            note(f"{collection.name}: {live:,} of {state.documents:,} documents")
    if live != state.documents or last > state.seq:
        raise MigrationError(
            f"The ledger is damaged: {collection.name!r} should have {state.documents:,} documents up to operation "
            f"{state.seq:,}, and has {live:,} up to {last:,}. Nothing was moved: restore a backup, and move that"
        )


def _differs(target: Loading, what: str) -> MigrationError:
    return MigrationError(
        f"What arrived in {target.place} is not what was sent: {what} differs. Nothing was kept there; try again, and "
        "have that database's disk and memory checked if it differs again"
    )


async def _not_empty(target: Loading) -> MigrationError:
    found = [f"{collection.name!r} ({state.documents:,} documents)" for collection, state in await target.collections()]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    holds = ", ".join(found[:_NAMED]) + more if found else "what is left of a deleted collection"
    return MigrationError(
        f"The ledger {target.place} is not empty, and not the same as this one: it has {holds}. Nothing was changed. "
        "Name a database without a ledger, or another schema in it: …?schema=other"
    )
