"""Which parts of a long document are scored."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rerank.windows import windows


@pytest.mark.parametrize(
    ("length", "room", "overlap", "expected"),
    [
        (0, 10, 3, [(0, 0)]),
        (10, 10, 3, [(0, 10)]),
        (11, 10, 3, [(0, 10), (7, 11)]),
        (24, 10, 3, [(0, 10), (7, 17), (14, 24)]),
        (25, 10, 0, [(0, 10), (10, 20), (20, 25)]),
        (20, 10, 9, [(0, 10), (5, 15), (10, 20)]),
        (3, 1, 5, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_the_parts(length, room, overlap, expected):
    """What fits is one part, even if it is empty; else neighbours share the overlap, half a part at most."""
    assert windows(length, room, overlap=overlap, most=100) == expected


def test_the_first_so_many_parts():
    """What comes after the most parts allowed is not read."""
    assert windows(1_000_000, 10, overlap=2, most=3) == [(0, 10), (8, 18), (16, 26)]
    assert windows(50, 10, overlap=2, most=1) == [(0, 10)]


@given(st.integers(0, 500), st.integers(1, 60), st.integers(0, 80))
def test_every_token_is_in_a_part(length, room, overlap):
    """Together the parts are the document, in order; each fits; none lies within the one before."""
    parts = windows(length, room, overlap=overlap, most=1000)
    assert (parts[0][0], parts[-1][1]) == (0, length)
    assert all(0 <= end - start <= room for start, end in parts)
    for (start, end), (next_start, next_end) in pairwise(parts):
        assert start < next_start <= end < next_end
