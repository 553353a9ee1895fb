"""Collections and their aliases in SQLite's rows."""

from collections.abc import Mapping
from typing import Any

import apsw
import orjson

from services.common.errors import Conflict, NotFound
from services.search.ledger.encoding import gone
from services.search.ledger.schema import SEQ_BITS
from services.search.ports import Collection, CollectionState

MAX_CLEARED = 500

_COLLECTION = "uuid, name, model, fingerprint, dim, shards, created_at, metric, attributes, language"


# --- reading --------------------------------------------------------------------------------------------------------


def collections(connection: apsw.Connection) -> list[Collection]:
    """Return the live collections by name."""
    sql = f"SELECT {_COLLECTION} FROM collections WHERE name IS NOT NULL ORDER BY name"
    return [_collection(row) for row in connection.execute(sql).fetchall()]


def find(connection: apsw.Connection, name: str) -> Collection | None:
    """Return the collection called *name*, or the one that the alias *name* means."""
    sql = f"""
        SELECT {_COLLECTION} FROM collections WHERE number = ifnull(
            (SELECT number FROM collections WHERE name = ?1), (SELECT collection FROM aliases WHERE name = ?1))
    """
    found = connection.execute(sql, (name,)).fetchall()
    return _collection(found[0]) if found else None


def state(connection: apsw.Connection, uuid: str) -> CollectionState:
    """Return where a collection stands. Raises NotFound."""
    sql = "SELECT seq, documents, trimmed_seq FROM collections WHERE uuid = ? AND name IS NOT NULL"
    found: list[Any] = connection.execute(sql, (uuid,)).fetchall()
    if not found:
        raise gone(uuid)
    return CollectionState(*found[0])


def positions(connection: apsw.Connection) -> dict[str, int]:
    """Return the last operation number of every live collection by its uuid."""
    found: list[Any] = connection.execute("SELECT uuid, seq FROM collections WHERE name IS NOT NULL").fetchall()
    return dict(found)


def number_of(connection: apsw.Connection, uuid: str) -> int | None:
    """Return the number of a live collection in this file."""
    found: int | None = connection.execute(
        "SELECT number FROM collections WHERE uuid = ? AND name IS NOT NULL", (uuid,)
    ).get
    return found


def aliases(connection: apsw.Connection) -> dict[str, str]:
    """Return every alias with the name of its collection, by alias."""
    sql = "SELECT a.name, c.name FROM aliases a JOIN collections c ON c.number = a.collection ORDER BY a.name"
    found: list[Any] = connection.execute(sql).fetchall()
    return dict(found)


def _collection(row: tuple[Any, ...]) -> Collection:
    values = list(row)
    if values[8] is not None:  # attributes
        values[8] = orjson.loads(values[8])
    return Collection(*values)


# --- writing, inside a transaction ----------------------------------------------------------------------------------


def create(connection: apsw.Connection, collection: Collection) -> None:
    """Add *collection*. Raises Conflict when its name or its uuid is taken."""
    taken = connection.execute(
        "SELECT 1 FROM collections WHERE name = ? OR uuid = ?", (collection.name, collection.uuid)
    ).get
    if taken:
        raise Conflict(f"There is a collection {collection.name!r} already: choose another name, or delete it first")
    if connection.execute("SELECT 1 FROM aliases WHERE name = ?", (collection.name,)).get:
        raise Conflict(f"There is an alias {collection.name!r} already: choose another name, or remove the alias first")
    kinds = None if collection.attributes is None else orjson.dumps(dict(collection.attributes)).decode()
    connection.execute(
        f"INSERT INTO collections ({_COLLECTION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            collection.uuid,
            collection.name,
            collection.model,
            collection.fingerprint,
            collection.dim,
            collection.shards,
            collection.created_at,
            collection.metric,
            kinds,
            collection.language,
        ),
    )


def drop(connection: apsw.Connection, uuid: str) -> bool:
    """Make a collection disappear from all reads at once, with its aliases; `clear` then frees its space."""
    number = number_of(connection, uuid)
    if number is None:
        return False
    connection.execute("DELETE FROM aliases WHERE collection = ?", (number,))
    connection.execute("UPDATE collections SET name = NULL WHERE number = ?", (number,))
    return True


def clear(connection: apsw.Connection) -> bool:
    """Remove some rows of a dropped collection; False when there is none."""
    number = connection.execute("SELECT number FROM collections WHERE name IS NULL LIMIT 1").get
    if number is None:
        return False
    connection.execute(
        "DELETE FROM documents WHERE place IN (SELECT place FROM documents WHERE place >= ? AND place < ? LIMIT ?)",
        (number << SEQ_BITS, (number + 1) << SEQ_BITS, MAX_CLEARED),
    )
    if connection.changes() == 0:
        connection.execute("DELETE FROM receipts WHERE collection = ?", (number,))
        connection.execute("DELETE FROM epoch_seqs WHERE collection = ?", (number,))
        connection.execute("DELETE FROM collections WHERE number = ?", (number,))
    return True


def set_aliases(connection: apsw.Connection, changes: Mapping[str, str | None]) -> None:
    """Let each alias mean the collection named, or nothing. Raises NotFound or Conflict."""
    for alias, name in changes.items():
        if name is None:
            connection.execute("DELETE FROM aliases WHERE name = ?", (alias,))
            continue
        if connection.execute("SELECT 1 FROM collections WHERE name = ?", (alias,)).get:
            raise Conflict(f"There is a collection {alias!r}: choose another alias, or delete the collection first")
        number = connection.execute("SELECT number FROM collections WHERE name = ?", (name,)).get
        if number is None:
            raise NotFound(f"The alias {alias!r} cannot mean {name!r}: there is no collection of that name")
        connection.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, number))
