"""Refuses request bodies over the limit: by their stated length before anything is read, else as they arrive."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import BodyTooLarge, Malformed
from services.common.headers import header
from services.common.http_errors import respond


class BodyLimitMiddleware:
    """
    Answers 413 for bodies over *max_body_bytes*. The server sees to it that a stated length is true.

    Requests that *streams* accepts have no limit here: whoever reads them holds no more than a piece of the body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, *, streams: Callable[[Scope], bool] | None = None) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or (self._streams is not None and self._streams(scope)):
            await self._app(scope, receive, send)
            return
        stated = header(scope, b"content-length")
        if stated is not None:
            refusal = self._refusal(stated)
            await (self._app if refusal is None else respond(scope, refusal))(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large(f"over {self._max_body_bytes:,}")
            return message

        await self._app(scope, counted_receive, send)

    def _refusal(self, stated: bytes) -> BodyTooLarge | Malformed | None:
        if not stated.isdigit():
            return Malformed("Content-Length must be a number", param="content-length")
        if int(stated) > self._max_body_bytes:
            return self._too_large(f"{int(stated):,}")
        return None

    def _too_large(self, size: str) -> BodyTooLarge:
        return BodyTooLarge(
            f"The body is {size} bytes; the limit is {self._max_body_bytes:,}. Send smaller batches", param="body"
        )
