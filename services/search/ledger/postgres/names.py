"""Collections and aliases, by the names that they share."""

from collections.abc import Mapping
from typing import Any

import asyncpg
import orjson

from services.common.errors import Conflict, NotFound
from services.search.ledger.postgres.schema import LOCK
from services.search.ports import Collection

_COLUMNS = "uuid, name, model, fingerprint, dim, shards, created_at, metric, attributes, language"
_FIND = f"""
    SELECT {_COLUMNS} FROM collections WHERE name = $1
    UNION ALL
    SELECT {_COLUMNS} FROM collections WHERE name IS NOT NULL
        AND number = (SELECT collection FROM aliases WHERE aliases.name = $1)
"""


async def collections(connection: asyncpg.Connection) -> list[Collection]:
    """Return the live collections by name."""
    sql = f"SELECT {_COLUMNS} FROM collections WHERE name IS NOT NULL ORDER BY name"
    return [_collection(row) for row in await connection.fetch(sql)]


async def find(connection: asyncpg.Connection, name: str) -> Collection | None:
    """Return the collection that *name* means, as its own name or as an alias."""
    found = await connection.fetchrow(_FIND, name)
    return None if found is None else _collection(found)


async def create(connection: asyncpg.Connection, schema: str, collection: Collection) -> None:
    """Add *collection*. Raises Conflict when its name or its uuid is taken."""
    await connection.fetchval(LOCK, schema)
    sql = "SELECT 1 FROM collections WHERE name = $1 OR uuid = $2"
    if await connection.fetchval(sql, collection.name, collection.uuid):
        raise Conflict(f"There is a collection {collection.name!r} already: choose another name, or delete it first")
    if await connection.fetchval("SELECT 1 FROM aliases WHERE name = $1", collection.name):
        raise Conflict(f"There is an alias {collection.name!r} already: choose another name, or remove it first")
    await connection.execute(
        f"INSERT INTO collections ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        collection.uuid,
        collection.name,
        collection.model,
        collection.fingerprint,
        collection.dim,
        collection.shards,
        collection.created_at,
        collection.metric,
        None if collection.attributes is None else orjson.dumps(dict(collection.attributes)),
        collection.language,
    )


async def drop(connection: asyncpg.Connection, schema: str, uuid: str) -> bool:
    """Make a collection, its documents and its aliases disappear from all reads at once; False when there was none."""
    await connection.fetchval(LOCK, schema)
    sql = "UPDATE collections SET name = NULL WHERE uuid = $1 AND name IS NOT NULL RETURNING number"
    number = await connection.fetchval(sql, uuid)
    if number is None:
        return False
    await connection.execute("DELETE FROM aliases WHERE collection = $1", number)
    return True


async def aliases(connection: asyncpg.Connection) -> dict[str, str]:
    """Return all aliases, by name, each with the name of its collection."""
    sql = """
        SELECT a.name, c.name FROM aliases a JOIN collections c ON c.number = a.collection
        WHERE c.name IS NOT NULL ORDER BY a.name
    """
    return dict(await connection.fetch(sql))


async def set_aliases(connection: asyncpg.Connection, schema: str, changes: Mapping[str, str | None]) -> None:
    """Let each alias mean the collection named, or nothing. Raises NotFound or Conflict."""
    await connection.fetchval(LOCK, schema)
    for alias, name in changes.items():
        if name is None:
            await connection.execute("DELETE FROM aliases WHERE name = $1", alias)
            continue
        number = await connection.fetchval("SELECT number FROM collections WHERE name = $1", name)
        if number is None:
            raise NotFound(f"There is no collection {name!r} for the alias {alias!r}")
        if await connection.fetchval("SELECT 1 FROM collections WHERE name = $1", alias):
            raise Conflict(f"There is a collection {alias!r}: an alias cannot have its name")
        sql = """
            INSERT INTO aliases (name, collection) VALUES ($1, $2)
            ON CONFLICT (name) DO UPDATE SET collection = excluded.collection
        """
        await connection.execute(sql, alias, number)


def _collection(row: Any) -> Collection:
    fields = dict(row)
    attributes = fields.pop("attributes")
    return Collection(**fields, attributes=None if attributes is None else orjson.loads(attributes))
