"""Cancels a request's work when its caller disconnects: FastAPI does not look."""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class DisconnectMiddleware:
    """Watches for `http.disconnect` once the whole body was read, and cancels the handler's task then."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body_read = asyncio.Event()
        gone = asyncio.Event()

        async def watched_receive() -> Message:
            if body_read.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.disconnect":
                gone.set()
                body_read.set()
            elif not message.get("more_body", False):
                body_read.set()
            return message

        handler = asyncio.ensure_future(self._app(scope, watched_receive, send))
        watcher = asyncio.ensure_future(_wait_gone(receive, body_read, gone))
        try:
            await asyncio.wait((handler, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not handler.done():
                handler.cancel()
            with suppress(asyncio.CancelledError):
                await handler
        finally:
            handler.cancel()
            watcher.cancel()


async def _wait_gone(receive: Receive, body_read: asyncio.Event, gone: asyncio.Event) -> None:
    await body_read.wait()
    while not gone.is_set():
        if (await receive())["type"] == "http.disconnect":
            gone.set()
