"""How the tests of a ledger open, close and reopen it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from services.search.ports import Collection, Ledger
from tests.contract.ledger_model import make_collection


class LedgerPlace:
    """Ledgers for tests: override `open`; *place* is a directory that stands for one database."""

    async def open(self, place: Path) -> Ledger:
        """Open the ledger of *place*, creating it the first time."""
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self, place: Path) -> AsyncIterator[Ledger]:
        """Open the ledger of *place* and close it at the end."""
        ledger = await self.open(place)
        try:
            yield ledger
        finally:
            await ledger.aclose()

    @pytest.fixture
    async def stack(self) -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as stack:
            yield stack

    @pytest.fixture
    async def ledger(self, tmp_path: Path, stack: AsyncExitStack) -> Ledger:
        return await stack.enter_async_context(self.opened(tmp_path))

    @pytest.fixture
    def reopen(self, tmp_path: Path, ledger: Ledger, stack: AsyncExitStack) -> Callable[[], Awaitable[Ledger]]:
        async def again() -> Ledger:
            await stack.aclose()
            return await stack.enter_async_context(self.opened(tmp_path))

        return again

    @pytest.fixture
    async def books(self, ledger: Ledger) -> Collection:
        collection = make_collection()
        await ledger.create_collection(collection)
        return collection
