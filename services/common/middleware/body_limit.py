"""Refuses request bodies over the limit: by their stated length before anything is read, else as they arrive."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import Malformed, TooLarge
from services.common.http_errors import error_response


class BodyLimitMiddleware:
    """Answers 413 for bodies over *max_body_bytes*."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_stated_length(scope)
        except (TooLarge, Malformed) as error:
            scope["tercet_error_code"] = error.code
            await error_response(error, request_id=scope.get("tercet_request_id"))(scope, receive, send)
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

    def _check_stated_length(self, scope: Scope) -> None:
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not stated.isdigit():
            raise Malformed("Content-Length must be a number", param="content-length")
        if int(stated) > self._max_body_bytes:
            raise self._too_large(f"{int(stated):,}")

    def _too_large(self, size: str) -> TooLarge:
        return TooLarge(
            f"The body is {size} bytes; the limit is {self._max_body_bytes:,}. Send smaller batches", param="body"
        )
