"""
Which addresses a URL's name stands for, looked up again all the time.

Connections that stay open would never find an address that is new, such as a new pod's behind a headless service; and a
resolver that hangs must not hang who asks: it is waited for in a thread of its own, and never in more than one a name.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

import structlog

from services.common.errors import DependencyUnavailable

RESOLVE_EVERY_S = 3.0
RESOLVE_AGAIN_S = 0.5  # A name that is not known, or that has an address which fails, is looked up again after so long.
RESOLVE_PATIENCE_S = 1.0

_log = structlog.get_logger(__name__)


async def resolve(host: str, port: int) -> tuple[str, ...]:
    """Return the addresses of a name, in a fixed order. Raises OSError."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def settle(answer: tuple[str, ...] | OSError) -> None:
        if found.done():
            return
        if isinstance(answer, OSError):
            found.set_exception(answer)
        else:
            found.set_result(answer)

    def look() -> None:
        answer: tuple[str, ...] | OSError
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer = tuple(sorted({str(info[4][0]) for info in infos}))
        except (OSError, UnicodeError) as error:
            answer = error if isinstance(error, OSError) else OSError(str(error))
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
            loop.call_soon_threadsafe(settle, answer)

    # A daemon, unlike a pool's threads: one that hangs must not keep the process from ending.
    threading.Thread(target=look, name=f"resolve {host}", daemon=True).start()
    return await found


class Addresses:
    """The addresses of one URL's name. Used from one event loop; close it with `aclose`."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        parts = urlsplit(url)
        self.url = url
        self.scheme = parts.scheme
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._clock = clock
        self._literal = _is_address(self.host)
        self._known: tuple[str, ...] = (self.host,) if self._literal else ()
        self._looked_at = -RESOLVE_EVERY_S
        self._looking: asyncio.Task[bool] | None = None

    @property
    def known(self) -> tuple[str, ...]:
        """What the name stood for when it was last found; empty while it never was."""
        return self._known

    @property
    def authority(self) -> str | None:
        """The name and port that TLS and proxies know the addresses by; None where the URL has an address itself."""
        return None if self._literal else f"{self.host}:{self.port}"

    def at(self, address: str) -> str:
        """Return the URL with *address* in place of the name."""
        literal = f"[{address}]" if ":" in address else address
        return f"{self.scheme}://{literal}:{self.port}{self._path}"

    def refresh(self, *, soon: bool = False) -> None:
        """Look the name up again in the background if that is due; *soon* where an address of it failed."""
        every_s = RESOLVE_AGAIN_S if soon or not self._known else RESOLVE_EVERY_S
        if not self._literal and self._looking is None and self._clock() - self._looked_at >= every_s:
            self._begin()

    async def current(self, patience_s: float = RESOLVE_PATIENCE_S) -> tuple[str, ...]:
        """
        Return the addresses: at once where they are known, else as soon as the name was looked up.

        Raises:
            DependencyUnavailable: The name is not known, or not within *patience_s*; at once if it was not just before.
        """
        self.refresh()
        if self._known:
            return self._known
        if self._looking is not None and self._clock() - self._looked_at < RESOLVE_PATIENCE_S:
            await asyncio.wait({self._looking}, timeout=min(patience_s, RESOLVE_PATIENCE_S))
        if not self._known:
            raise DependencyUnavailable(f"The name {self.host} cannot be resolved", retry_after_s=RESOLVE_AGAIN_S)
        return self._known

    async def look(self) -> bool:
        """Look the name up now, whatever is known of it, and return whether it was found in time."""
        if self._literal:
            return True
        looking = self._looking or self._begin()
        done, _ = await asyncio.wait({looking}, timeout=RESOLVE_PATIENCE_S)
        return any(task.result() for task in done if not task.cancelled())

    async def aclose(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    def _begin(self) -> asyncio.Task[bool]:
        self._looked_at = self._clock()
        self._looking = asyncio.create_task(self._look())
        self._looking.add_done_callback(self._looked)
        return self._looking

    def _looked(self, _task: asyncio.Task[bool]) -> None:
        self._looking = None
        self._looked_at = self._clock()

    async def _look(self) -> bool:
        try:
            self._known = await resolve(self.host, self.port) or self._known
        except OSError as error:
            _log.warning("name_not_resolved", url=self.url, error=repr(error))
            return False
        return bool(self._known)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
