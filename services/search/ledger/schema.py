"""The tables of the SQLite ledger, version by version, and how a file is brought to the newest."""

from pathlib import Path

import apsw

from services.common.errors import NotReady

# A document lies at its collection's number and its last operation's number, so that the log is read in one sweep.
SEQ_BITS = 40
MAX_SEQ = 2**SEQ_BITS - 1

# One script per schema version, never edited once released. `name` is NULL while a deleted collection is being cleared;
# a deleted document stays as a row of which only the keys are left, so that followers see the deletion.
MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE collections (
        uuid TEXT NOT NULL PRIMARY KEY,
        name TEXT UNIQUE,
        model TEXT,
        fingerprint TEXT NOT NULL,
        dim INTEGER NOT NULL,
        shards INTEGER NOT NULL,
        created_at REAL NOT NULL,
        seq INTEGER NOT NULL DEFAULT 0,
        documents INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE documents (
        collection TEXT NOT NULL REFERENCES collections (uuid),
        id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        deleted INTEGER NOT NULL,
        content_hash BLOB,
        embedded_hash BLOB,
        vector BLOB,
        title TEXT,
        metadata BLOB,
        text TEXT,
        PRIMARY KEY (collection, id),
        CHECK (deleted = (vector IS NULL) AND deleted = (text IS NULL))
    ) STRICT;
    CREATE UNIQUE INDEX documents_by_seq ON documents (collection, seq);
    """,
    # `place` is collection << 40 | seq. `epoch_seqs` tells where a collection stood when an epoch began, unless it
    # stood there at the last row before already. The one epoch of version 1 becomes the first.
    """
    ALTER TABLE collections RENAME TO collections_1;
    ALTER TABLE documents RENAME TO documents_1;
    CREATE TABLE collections (
        number INTEGER PRIMARY KEY,
        uuid TEXT NOT NULL UNIQUE,
        name TEXT UNIQUE,
        model TEXT,
        fingerprint TEXT NOT NULL,
        dim INTEGER NOT NULL,
        shards INTEGER NOT NULL,
        created_at REAL NOT NULL,
        metric TEXT NOT NULL,
        attributes TEXT,
        language TEXT NOT NULL,
        seq INTEGER NOT NULL DEFAULT 0,
        documents INTEGER NOT NULL DEFAULT 0,
        trimmed_seq INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE documents (
        place INTEGER PRIMARY KEY,
        collection INTEGER NOT NULL,
        id TEXT NOT NULL,
        deleted INTEGER NOT NULL,
        content_hash BLOB,
        embedded_hash BLOB,
        title TEXT,
        metadata TEXT,
        text TEXT,
        vector BLOB,
        CHECK (deleted = (vector IS NULL) AND deleted = (text IS NULL))
    ) STRICT;
    CREATE TABLE aliases (
        name TEXT NOT NULL PRIMARY KEY,
        collection INTEGER NOT NULL REFERENCES collections (number)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE receipts (
        collection INTEGER NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        body BLOB NOT NULL,
        seq INTEGER NOT NULL,
        written_at REAL NOT NULL,
        PRIMARY KEY (collection, key)
    ) STRICT;
    CREATE INDEX receipts_by_age ON receipts (written_at);
    CREATE TABLE epochs (number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, started_at REAL NOT NULL) STRICT;
    CREATE TABLE epoch_seqs (
        collection INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        PRIMARY KEY (collection, epoch)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO collections (uuid, name, model, fingerprint, dim, shards, created_at, metric, language, seq, documents)
        SELECT uuid, name, model, fingerprint, dim, shards, created_at, 'cosine', 'english', seq, documents
        FROM collections_1 ORDER BY created_at;
    INSERT INTO documents
        SELECT c.number << 40 | d.seq, c.number, d.id, d.deleted, d.content_hash, d.embedded_hash, d.title,
            CAST(d.metadata AS TEXT), d.text, d.vector
        FROM collections c CROSS JOIN documents_1 d WHERE d.collection = c.uuid ORDER BY c.number, d.seq;
    INSERT INTO epochs SELECT 1, value, 0 FROM meta WHERE key = 'epoch';
    DROP TABLE documents_1;
    DROP TABLE collections_1;
    DROP TABLE meta;
    CREATE UNIQUE INDEX documents_by_id ON documents (collection, id);
    CREATE INDEX deletions ON documents (place) WHERE deleted;
    """,
)


def migrate(connection: apsw.Connection, path: Path) -> None:
    """
    Bring the schema up to date, each version in a transaction of its own.

    Raises:
        NotReady: A newer Tercet wrote this file.
    """
    version = int(connection.pragma("user_version"))
    if version > len(MIGRATIONS):
        raise NotReady(
            f"The ledger {path} has schema version {version}, and this Tercet knows versions up to {len(MIGRATIONS)}: "
            "start the newer Tercet that wrote it, or restore an older backup"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(script)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
