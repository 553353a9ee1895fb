"""Turns requests away before they are read, where the service says so: in overload reading them is what takes its time."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.errors import Overloaded
from services.common.http_errors import respond

Door = Callable[[Scope], Callable[[], None] | None]


class SheddingMiddleware:
    """
    Asks *door* before each request: it raises Overloaded, which is answered, or returns what to call at the end, if anything.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            leave = self._door(scope) if scope["type"] == "http" else None
        except Overloaded as error:
            await respond(scope, error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if leave is not None:
                leave()
