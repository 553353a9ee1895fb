"""Many searches at once: each answered or refused by itself."""

import asyncio
from collections.abc import Callable, Sequence

from services.common.deadline import Deadline
from services.common.errors import TercetError
from services.common.wire.search import SearchReply, SearchRequest
from services.search.pipeline import SearchPipeline

AT_ONCE = 8


async def search_each(
    pipeline: SearchPipeline,
    requests: Sequence[SearchRequest],
    due: Callable[[SearchRequest], Deadline],
    *,
    request_id: str | None,
) -> list[SearchReply | TercetError]:
    """
    Return what each of *requests* came to, in their order; up to eight run at a time.

    *due* is asked when a search begins, so that waiting for its turn costs it none of its own time. Cancelling cancels
    all of them.
    """
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(request: SearchRequest) -> SearchReply | TercetError:
        async with turns:
            try:
                return await pipeline.search(request, due(request), request_id=request_id)
            except TercetError as error:
                return error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(request)) for request in requests]
    return [task.result() for task in tasks]
