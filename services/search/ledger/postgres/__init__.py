"""The shared ledger: one PostgreSQL database that any number of routers write and any number of followers read."""

from services.search.ledger.postgres.ledger import PostgresLedger

__all__ = ["PostgresLedger"]
