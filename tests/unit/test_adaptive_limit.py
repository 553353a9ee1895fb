"""The limit's arithmetic, told the time and what ended by the test."""

import pytest

from services.common.adaptive_limit import AdaptiveLimit, Load


@pytest.mark.parametrize(("given_up_after_s", "grows"), [(0.03, True), (2.0, False)])
def test_who_is_in_haste_does_not_pass_for_overload(given_up_after_s: float, grows: bool) -> None:
    """While costly work hangs, more is let in, even if callers of the rest allow it too little; not if they wait for long."""
    limit = AdaptiveLimit(floor=2.0, ceiling=1024.0, start=64.0, now=0.0)
    busy = Load(used_up=True, wanted=True, idle=False, keeps_up=True)

    def look(tick: int, costly_s: float, costly: int, given_up: int) -> None:
        for _ in range(costly):
            limit.ended(8.0, costly_s, 3.0)
        for _ in range(10):
            limit.ended(1.0, 0.01, 3.0)
        for _ in range(given_up):
            limit.failed(1.0, given_up_after_s, given_up_after_s)
        limit.look(tick * 0.1, busy)

    for tick in range(1, 20):
        look(tick, 0.01, costly=10, given_up=0)
    before = limit.limit
    for tick in range(20, 60):
        look(tick, 1.5, costly=1, given_up=3)
    assert (limit.limit > before) == grows


@pytest.mark.parametrize(
    ("takes_s", "allowed_s", "shrinks"),
    [(0.15, 1.0, False), (0.15, 0.3, True), (0.4, 60.0, True), (0.035, 0.05, False)],
)
def test_slow_is_measured_by_what_the_caller_allows_too(takes_s: float, allowed_s: float, shrinks: bool) -> None:
    """Work of 10 ms that takes a small part of its time is well; a large part, or long in itself, is not."""
    limit = AdaptiveLimit(floor=2.0, ceiling=1024.0, start=64.0, now=0.0)
    for tick in range(1, 60):
        for _ in range(10):
            limit.ended(1.0, 0.01 if tick < 20 else takes_s, allowed_s)
        limit.look(tick * 0.1, Load(used_up=tick >= 20, wanted=True, idle=False, keeps_up=False))
    assert (limit.limit < 32.0) == shrinks
    assert (limit.limit >= 64.0) != shrinks
