"""Lets in who has a key for it and has not used up an allowance; health, the page and the documentation are open to all."""

from collections.abc import Callable
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.auth import KeyRing, is_open
from services.common.errors import Forbidden, RateLimited, Unauthenticated
from services.common.governor import Governor, Limits
from services.common.http_errors import respond


class AccessMiddleware:
    """
    Answers 401, 403 and 429; leaves the caller's name and how to charge it in the scope.

    Callers are known by their key where there are *keys*, else by their address, and then all may do what *usual* says.
    *needs* tells the scope for a method and path.
    """

    def __init__(
        self, app: ASGIApp, *, keys: KeyRing | None, governor: Governor, usual: Limits, needs: Callable[[str, str], str]
    ) -> None:
        self._app = app
        self._keys = keys
        self._governor = governor
        self._usual = usual
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not is_open(scope["method"], scope["path"]):
            try:
                await self._admit(scope)
            except (Unauthenticated, Forbidden, RateLimited) as error:
                await respond(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        if self._keys is not None:
            key = self._keys.authenticate(dict(scope["headers"]), self._needs(scope["method"], scope["path"]))
            caller, limits = f"key:{key.name}", key.limits
            scope["tercet_caller"] = key.name
        else:
            client = scope.get("client")
            caller, limits = f"address:{client[0] if client else ''}", self._usual
        if limits.any:
            await self._governor.admit(caller, limits)
            if limits.tokens_per_s > 0:
                scope["tercet_charge"] = partial(self._governor.charge, caller, limits)
