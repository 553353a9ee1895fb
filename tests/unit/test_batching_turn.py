"""The lock that models on one device share: order, exclusion, and a device that is given up."""

import threading
import time

import pytest

from services.common.batching import DeviceTurn
from services.common.errors import NotReady

PATIENCE_S = 10.0


def wait_in_line(turn: DeviceTurn, number: int, served: list[object]) -> threading.Thread:
    """Start a thread that takes the turn once and notes it; return once it stands in line."""
    entered = threading.Event()

    def take() -> None:
        entered.set()
        try:
            turn.acquire()
        except NotReady as error:
            served.append(error.message)
            return
        served.append(number)
        turn.release()

    thread = threading.Thread(target=take)
    thread.start()
    entered.wait(PATIENCE_S)
    until = time.monotonic() + PATIENCE_S
    while len(turn._waiting) <= number and time.monotonic() < until:
        time.sleep(0.001)
    return thread


def test_the_turn_goes_round_in_the_order_of_arrival():
    """Whoever asked first is served first, and one that releases and asks again stands behind those who wait."""
    turn, served = DeviceTurn(), []
    turn.acquire()
    threads = [wait_in_line(turn, number, served) for number in range(5)]
    turn.release()
    turn.acquire()
    assert served == [0, 1, 2, 3, 4]
    turn.release()
    for thread in threads:
        thread.join(PATIENCE_S)


def test_only_one_has_the_turn():
    """Threads that hammer the turn never hold it at the same time."""
    turn, holders, most = DeviceTurn(), [], []

    def hammer() -> None:
        for _ in range(200):
            turn.acquire()
            holders.append(1)
            most.append(len(holders))
            holders.pop()
            turn.release()

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(most) == {1}
    assert len(most) == 800


def test_a_device_given_up_refuses_who_waits_and_who_comes():
    """Giving the device up ends all waiting with the reason, and nobody gets it afterwards."""
    turn, served = DeviceTurn(), []
    turn.acquire()
    thread = wait_in_line(turn, 0, served)
    turn.give_up("it hangs")
    thread.join(PATIENCE_S)
    assert served == ["it hangs"]
    turn.release()
    with pytest.raises(NotReady, match="it hangs"):
        turn.acquire()
