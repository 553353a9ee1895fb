"""The tables of the shared ledger, and how they come to be."""

import asyncpg

from services.common.errors import NotReady

# One script per schema version, never edited once released. `name` is NULL while a deleted collection is being cleared;
# a deleted document stays as a row of which only the keys and `seq` are left, so that followers see the deletion.
# What callers may fill with any characters is kept as UTF-8 bytes: PostgreSQL's text has no place for U+0000.
# A row up to 8 kB stays in one piece: with the default target every vector would lie in another table.
# `documents` has no foreign key: its writers hold the collection's row lock, and a check for each row would cost them dear.
MIGRATIONS = (
    """
    CREATE TABLE collections (
        number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        uuid text COLLATE "C" NOT NULL UNIQUE,
        name text COLLATE "C" UNIQUE,
        model text,
        fingerprint text NOT NULL,
        dim integer NOT NULL,
        shards integer NOT NULL,
        created_at double precision NOT NULL,
        metric text NOT NULL,
        attributes bytea,
        language text NOT NULL,
        seq bigint NOT NULL DEFAULT 0,
        documents bigint NOT NULL DEFAULT 0,
        trimmed_seq bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50);
    CREATE TABLE aliases (
        name text COLLATE "C" PRIMARY KEY,
        collection integer NOT NULL REFERENCES collections ON DELETE CASCADE
    );
    CREATE INDEX aliases_by_collection ON aliases (collection);
    CREATE TABLE documents (
        collection integer NOT NULL,
        id bytea NOT NULL,
        seq bigint NOT NULL,
        content_hash bytea,
        embedded_hash bytea,
        vector bytea,
        title bytea,
        metadata bytea,
        text bytea,
        PRIMARY KEY (collection, id),
        CHECK ((vector IS NULL) = (text IS NULL))
    ) WITH (toast_tuple_target = 8160);
    ALTER TABLE documents ALTER COLUMN vector SET STORAGE EXTERNAL;
    CREATE UNIQUE INDEX documents_by_seq ON documents (collection, seq);
    CREATE INDEX documents_deleted ON documents (collection, seq) WHERE text IS NULL;
    CREATE TABLE receipts (
        collection integer NOT NULL REFERENCES collections ON DELETE CASCADE,
        key bytea NOT NULL,
        digest bytea NOT NULL,
        body bytea NOT NULL,
        seq bigint NOT NULL,
        kept_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (collection, key)
    );
    CREATE INDEX receipts_by_age ON receipts (collection, kept_at);
    CREATE TABLE epochs (
        number integer PRIMARY KEY,
        token text NOT NULL UNIQUE,
        server text NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE epoch_starts (
        collection integer NOT NULL REFERENCES collections ON DELETE CASCADE,
        epoch integer NOT NULL REFERENCES epochs,
        seq bigint NOT NULL,
        PRIMARY KEY (collection, epoch)
    );
    """,
)

# Taken by whoever changes tables, epochs or names: one at a time in each schema.
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('tercet ledger ' || $1, 0))"


async def migrate(connection: asyncpg.Connection, schema: str) -> None:
    """
    Bring the tables in *schema* up to date, in one transaction; of several processes one does it and the others wait.

    An up-to-date schema is only read, so that a role without the right to create anything can serve.

    Raises:
        NotReady: A newer Tercet wrote this schema.
    """
    async with connection.transaction():
        await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        await connection.fetchval(LOCK, schema)
        if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", schema):
            await connection.execute(f"CREATE SCHEMA {schema}")
        if await connection.fetchval("SELECT to_regclass('migrations') IS NULL"):
            await connection.execute(
                "CREATE TABLE migrations (version integer PRIMARY KEY, made_at timestamptz NOT NULL DEFAULT now())"
            )
        version = await connection.fetchval("SELECT coalesce(max(version), 0) FROM migrations")
        if version > len(MIGRATIONS):
            raise NotReady(
                f"The ledger's schema {schema} has version {version}, and this Tercet knows versions up to "
                f"{len(MIGRATIONS)}: start the newer Tercet that wrote it, or restore an older backup"
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            await connection.execute(script)
            await connection.execute("INSERT INTO migrations (version) VALUES ($1)", number)
