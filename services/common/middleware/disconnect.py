"""Cancels a request's work when its caller disconnects: FastAPI does not look."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

WATCH_AFTER_S = 0.05


class DisconnectMiddleware:
    """Once the whole body was read, and if that was a little while ago, watches for `http.disconnect` and cancels then."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive)
        try:
            await self._app(scope, watch.receive, send)
        except asyncio.CancelledError:
            # What is cancelled for another reason too, as when the server stops, stays so.
            if not watch.end():
                raise
        finally:
            watch.end()


class _Watch:
    """Watches over one request, in whose task it is made."""

    __slots__ = ("_body_read", "_cancelled", "_gone", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task = asyncio.current_task()
        self._body_read = False
        self._cancelled = False
        self._gone: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """Return the next message as the handler sees them; after the body there is none until the caller is gone."""
        if self._body_read:
            self._start()
            assert self._gone is not None
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._body_read = True
            self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start)
        return message

    def end(self) -> bool:
        """Stop watching; return whether the handler was cancelled for its caller's going, and for nothing else."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if not self._cancelled:
            return False
        self._cancelled = False
        return self._task is not None and self._task.uncancel() == 0

    def _start(self) -> None:
        if self._watcher is None:
            self._gone = asyncio.Event()
            self._watcher = asyncio.get_running_loop().create_task(self._wait_gone(self._gone))

    async def _wait_gone(self, gone: asyncio.Event) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        gone.set()
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()
