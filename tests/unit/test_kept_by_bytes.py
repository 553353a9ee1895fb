"""Values in memory, bounded by bytes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from services.rerank.kept import KeptByBytes

VALUE = np.zeros(100, np.int8)


def keeping(values: int) -> KeptByBytes[np.ndarray]:
    """Return one with room for so many of VALUE."""
    return KeptByBytes(values * VALUE.nbytes)


def test_the_least_recently_used_go_first() -> None:
    """Asking for an entry is using it; there are never more bytes than the bound."""
    kept = keeping(3)
    for key in (b"a", b"b", b"c"):
        kept.put(key, VALUE)
    assert kept.get(b"a") is VALUE
    kept.put(b"d", VALUE)
    assert [key for key in (b"a", b"b", b"c", b"d") if kept.get(key) is not None] == [b"a", b"c", b"d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    """It would push out everything else, and go with the next."""
    kept = keeping(1)
    kept.put(b"a", VALUE)
    kept.put(b"b", np.zeros(101, np.int8))
    assert kept.get(b"a") is VALUE
    assert kept.get(b"b") is None


def test_the_first_value_of_a_key_stays() -> None:
    """Putting another one changes nothing, and counts no bytes twice."""
    kept = keeping(2)
    for _ in range(5):
        kept.put(b"a", VALUE)
    kept.put(b"a", VALUE + 1)
    kept.put(b"b", VALUE)
    assert kept.get(b"a") is VALUE
    assert kept.get(b"b") is VALUE


def test_all_can_be_taken_out() -> None:
    """Oldest first; afterwards there is room again."""
    kept = keeping(2)
    for key in (b"a", b"b", b"c"):
        kept.put(key, VALUE)
    assert [key for key, _ in kept.drain()] == [b"b", b"c"]
    assert kept.drain() == []
    kept.put(b"d", VALUE)
    kept.put(b"e", VALUE)
    assert [key for key, _ in kept.drain()] == [b"d", b"e"]


def test_threads_keep_the_bound() -> None:
    """Threads that put, get and take out at once leave it whole."""
    kept = keeping(5)

    def work(number: int) -> None:
        for step in range(300):
            kept.put(b"%d" % ((number * step) % 17), VALUE)
            kept.get(b"%d" % (step % 17))
            if step % 100 == 99:
                assert len(kept.drain()) <= 5

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    for key in range(20):
        kept.put(b"k%d" % key, VALUE)
    assert [key for key, _ in kept.drain()] == [b"k15", b"k16", b"k17", b"k18", b"k19"]
