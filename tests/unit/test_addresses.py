"""Names and their addresses, with a resolver of the test's own."""

import asyncio
import threading

import pytest

from services.common import addresses
from services.common.addresses import Addresses
from services.common.errors import DependencyUnavailable
from tests.virtual_time import Clock


class Names:
    """Resolves the names that it knows."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, ...]] = {}
        self.asked = 0

    async def __call__(self, host: str, _port: int) -> tuple[str, ...]:
        self.asked += 1
        if host not in self.known:
            raise OSError("no such name")
        return self.known[host]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The names that there are."""
    names = Names()
    monkeypatch.setattr(addresses, "resolve", names)
    return names


async def test_an_address_stands_for_itself(names: Names) -> None:
    """It is never looked up; a URL's path and port are kept."""
    for url, address, at in (
        ("http://127.0.0.1:8001", "127.0.0.1", "http://127.0.0.1:8001"),
        ("https://[fd00::1]/base/", "fd00::1", "https://[fd00::1]:443/base"),
    ):
        found = Addresses(url)
        assert await found.current() == (address,)
        assert await found.look()
        assert (found.at(address), found.authority) == (at, None)
    assert names.asked == 0


async def test_a_name_is_looked_up_again_while_it_is_used(names: Names) -> None:
    """In the background, every few seconds, sooner where an address failed; a name that is lost keeps its addresses."""
    clock = Clock()
    names.known["peers"] = ("10.0.0.1",)
    found = Addresses("http://peers:8001", clock=clock)
    assert found.authority == "peers:8001"
    assert await found.current() == ("10.0.0.1",)
    names.known["peers"] = ("10.0.0.1", "10.0.0.2")
    assert await found.current() == ("10.0.0.1",)
    clock.now += addresses.RESOLVE_EVERY_S
    await found.current()
    await found.look()
    assert await found.current() == ("10.0.0.1", "10.0.0.2")
    assert names.asked == 2
    del names.known["peers"]
    clock.now += addresses.RESOLVE_AGAIN_S
    found.refresh()
    assert names.asked == 2
    found.refresh(soon=True)
    assert not await found.look()
    assert await found.current() == ("10.0.0.1", "10.0.0.2")
    await found.aclose()


async def test_a_name_that_is_not_known_fails_at_once_and_is_found_later(names: Names) -> None:
    """It is not looked up for each call, and used as soon as it is known."""
    clock = Clock()
    found = Addresses("http://peers:8001", clock=clock)
    for _ in range(5):
        with pytest.raises(DependencyUnavailable, match="peers cannot be resolved"):
            await found.current()
    assert names.asked == 1
    names.known["peers"] = ("10.0.0.1",)
    clock.now += addresses.RESOLVE_AGAIN_S
    assert await found.current() == ("10.0.0.1",)
    await found.aclose()


async def test_a_resolver_that_hangs_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread waits for it, callers only while it is young, and each no longer than it has."""
    release = threading.Event()
    threads: list[str] = []

    def hang(*_: object, **__: object) -> list[object]:
        threads.append(threading.current_thread().name)
        release.wait(10)
        return []

    monkeypatch.setattr(addresses.socket, "getaddrinfo", hang)
    clock = Clock()
    found = Addresses("http://peers:8001", clock=clock)
    with pytest.raises(DependencyUnavailable):
        await found.current(0.01)
    clock.now += addresses.RESOLVE_PATIENCE_S
    for _ in range(3):
        with pytest.raises(DependencyUnavailable):
            await found.current()
    assert threads == ["resolve peers"]
    release.set()
    await found.aclose()


async def test_real_names_resolve() -> None:
    """`localhost` has an address, and a name under `.invalid` has none."""
    assert set(await addresses.resolve("localhost", 80)) & {"127.0.0.1", "::1"}
    with pytest.raises(OSError):
        await asyncio.wait_for(addresses.resolve("nowhere.invalid", 80), 30)
