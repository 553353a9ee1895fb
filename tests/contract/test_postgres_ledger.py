"""The shared ledger, held to the contract."""

from pathlib import Path
from urllib.parse import quote
from zlib import crc32

import pytest

from services.search.ledger.postgres import PostgresLedger
from services.search.ports import Ledger
from tests.contract.ledger_contract import LedgerContract


class TestPostgresLedger(LedgerContract):
    """The shared ledger; each directory that the contract names is a schema of its own."""

    @pytest.fixture(autouse=True)
    def _database(self, postgres_url: str) -> None:
        self.url = postgres_url

    async def open(self, place: Path) -> Ledger:
        schema = f"t_{crc32(str(place).encode()):08x}_{quote(place.name).lower()}"
        schema = "".join(c if c.isalnum() else "_" for c in schema)[:48]
        return await PostgresLedger.open(f"{self.url}{'&' if '?' in self.url else '?'}schema={schema}", pool_size=4)
