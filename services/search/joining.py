"""Questions that want a vector at the same time share a call: the next one takes all that came while others were under way."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Final

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, TooLarge
from services.search.ports import Embedded

MOST_UNDER_WAY: Final = 2  # One is computed while the other travels.
MOST_TOGETHER: Final = 64
PATIENCE_S: Final = 0.1  # A call that takes longer holds nobody back: it may hang.

Send = Callable[[Sequence[str], Deadline, str | None], Awaitable[Embedded]]


@dataclass(slots=True, eq=False)
class _Asker:
    text: str
    deadline: Deadline
    answer: "asyncio.Future[Embedded]"
    context: Context


@dataclass(slots=True)
class _Model:
    """Who waits for a vector of one model, in order, the calls under way, and how many of those hold others back."""

    waiting: list[_Asker] = field(default_factory=list)
    calls: set["asyncio.Task[None]"] = field(default_factory=set)
    under_way: int = 0


class JoinedQuestions:
    """
    Asks *send* for the vectors of questions, several in one call where they come together.

    One that comes when fewer than `MOST_UNDER_WAY` calls to its model are under way is sent at once; nobody waits for company.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._models: dict[str | None, _Model] = {}

    async def ask(self, text: str, deadline: Deadline, model: str | None) -> Embedded:
        """
        Return the one vector of *text*, shape [1, dim].

        Raises what *send* raises; a text that the service refuses is refused to its own asker alone. Being cancelled harms
        nobody else's question; a call whose askers have all left is given up.

        Raises:
            DeadlineExceeded: *deadline* passed; the call goes on for those who have more time.
        """
        deadline.check("embedding a question")
        asker = _Asker(text, deadline, asyncio.get_running_loop().create_future(), copy_context())
        self._models.setdefault(model, _Model()).waiting.append(asker)
        self._send_more(model)
        try:
            async with asyncio.timeout(None if deadline.at == float("inf") else deadline.remaining_s()):
                return await asker.answer
        except TimeoutError:
            raise DeadlineExceeded("The question's vector did not come in time") from None

    def _send_more(self, model: str | None) -> None:
        """Send what waits, as far as calls may be under way."""
        here = self._models[model]
        while here.under_way < MOST_UNDER_WAY:
            askers = [asker for asker in here.waiting if not asker.answer.done()]
            here.waiting = askers[MOST_TOGETHER:]
            if not askers:
                break
            self._begin(model, askers[:MOST_TOGETHER])
        if not here.waiting and not here.calls:
            del self._models[model]

    def _begin(self, model: str | None, askers: list[_Asker]) -> None:
        """Answer *askers* in a task of its own, which lets others go next when it ends, at the latest after `PATIENCE_S`."""
        here = self._models[model]
        here.under_way += 1
        call = asyncio.create_task(self._answer(askers, model), context=askers[0].context)
        here.calls.add(call)
        left, holding = 0, True

        def release() -> None:
            nonlocal holding
            here.under_way -= holding
            holding = False
            self._send_more(model)

        def end(_: object) -> None:
            patience.cancel()
            here.calls.discard(call)
            release()

        def leave(_: object) -> None:
            nonlocal left
            left += 1
            if left == len(askers):
                call.cancel()

        patience = asyncio.get_running_loop().call_later(PATIENCE_S, release)
        call.add_done_callback(end)
        for asker in askers:
            asker.answer.add_done_callback(leave)

    async def _answer(self, askers: Sequence[_Asker], model: str | None) -> None:
        """Send the texts of *askers*, equal ones once, and hand out what comes: rows or the error."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(asker.text for asker in askers))}
        try:
            made = await self._send(
                list(rows), max((asker.deadline for asker in askers), key=lambda end: end.at), model
            )
        except (InvalidInput, TooLarge) as error:
            if len(rows) == 1:
                _fail(askers, error)
            else:
                await asyncio.gather(*(self._answer([one], model) for one in askers if not one.answer.done()))
        except asyncio.CancelledError:
            _fail(askers, DependencyUnavailable("The call for the question's vector was given up"))
            raise
        except Exception as error:
            _fail(askers, error)
        else:
            for asker in askers:
                if not asker.answer.done():
                    row = rows[asker.text]
                    asker.answer.set_result(Embedded(made.vectors[row : row + 1], made.model))


def _fail(askers: Sequence[_Asker], error: Exception) -> None:
    for asker in askers:
        if not asker.answer.done():
            asker.answer.set_exception(error)
