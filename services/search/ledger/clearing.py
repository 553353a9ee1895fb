"""Removing the rows of deleted collections, a part at a time, so that it never stands in the way of other work for long."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

_log = structlog.get_logger(__name__)


class Clearing:
    """
    Runs *clear_part*, which says whether there is more, until nothing is left.

    What fails or is cut short is done when it is asked for again: at the next deletion or start, by any process.
    """

    def __init__(self, place: str, clear_part: Callable[[], Awaitable[bool]]) -> None:
        self._place = place
        self._clear_part = clear_part
        self._task: asyncio.Task[None] | None = None
        self._asked = False

    def ask(self) -> None:
        """Clear in the background what is there to clear now."""
        self._asked = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Stop, once the part under way is done or given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._asked:
                self._asked = False
                while await self._clear_part():
                    pass
        except Exception as error:
            _log.warning("ledger_clearing_failed", ledger=self._place, error=repr(error), exc_info=error)
