"""Deadlines, and the header that carries them."""

import math
import time

import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, Malformed


def near(seconds: float):
    """Compare with *seconds*, give or take what a slow machine needs between two lines."""
    return pytest.approx(seconds, abs=0.5)


def test_after_is_that_many_seconds_away():
    """A deadline says how much time is left, and negative seconds once it has passed."""
    assert Deadline.after(30).remaining_s() == near(30)
    assert Deadline.after(-5).remaining_s() == near(-5)


def test_it_passes():
    """A deadline has passed from its moment on."""
    assert not Deadline.after(30).passed
    assert Deadline.after(0).passed
    assert Deadline(time.monotonic() - 1).passed


def test_no_deadline_never_passes():
    """Without a deadline there is always time."""
    assert NO_DEADLINE.remaining_s() == math.inf
    assert not NO_DEADLINE.passed
    assert NO_DEADLINE.earlier(10).remaining_s() == math.inf
    assert NO_DEADLINE.at_most(10).remaining_s() == near(10)


@pytest.mark.parametrize(("value", "seconds"), [("1500", 1.5), ("2500.5", 2.5005), ("1e4", 10.0), (" 900 ", 0.9)])
def test_the_header_is_milliseconds(value, seconds):
    """X-Deadline-Ms is the caller's remaining time in milliseconds."""
    assert Deadline.from_header(value, cap_s=600).remaining_s() == near(seconds)


@pytest.mark.parametrize("value", ["9999999999", "inf", "1e300"])
def test_the_header_is_capped(value):
    """Nobody can ask for more time than the service allows."""
    assert Deadline.from_header(value, cap_s=60).remaining_s() == near(60)


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "1 second", "0x10", "١٢x"])
def test_a_bad_header_is_named(value):
    """A header that is no positive number is Malformed and names the header."""
    with pytest.raises(Malformed, match="X-Deadline-Ms") as caught:
        Deadline.from_header(value, cap_s=60)
    assert caught.value.param == "x-deadline-ms"


def test_a_long_bad_header_is_not_echoed_whole():
    """An error message stays short whatever was sent."""
    with pytest.raises(Malformed) as caught:
        Deadline.from_header("x" * 5000, cap_s=60)
    assert len(caught.value.message) < 200


def test_the_next_service_hears_of_what_is_left():
    """The header written is whole milliseconds and never 0, which would be refused."""
    assert 1000 < int(Deadline.after(2).to_header()) <= 2000
    assert Deadline.after(-1).to_header() == "1"
    assert Deadline.from_header(Deadline.after(5).to_header(), cap_s=600).remaining_s() == near(5)


def test_a_stage_may_have_less():
    """A stage's deadline is kept back from, or capped within, the request's."""
    deadline = Deadline.after(10)
    assert deadline.earlier(3).at == deadline.at - 3
    assert deadline.at_most(4).remaining_s() == near(4)
    assert deadline.at_most(40) == deadline


def test_check_names_the_stage():
    """check does nothing while there is time, then says where the time ran out."""
    Deadline.after(30).check("reranking")
    with pytest.raises(DeadlineExceeded, match="ran out in reranking"):
        Deadline.after(-1).check("reranking")
