"""The score cache: its keys, its bytes, its bound, and what others know."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rerank.score_cache import KEY_BYTES, ScoreCache, ScoreKeys, pack, unpack
from services.rerank.scores import RawScore

SCORE = RawScore(0.25, tokens=40, passages=2, best_passage=(10, 90))


@dataclass
class Shelf:
    """Bytes by key, as another process left them."""

    held: dict[bytes, bytes] = field(default_factory=dict)
    asked: list[list[bytes]] = field(default_factory=list)

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See SharedBytes."""
        self.asked.append(list(keys))
        return [self.held.get(key) for key in keys]

    def put_later(self, entries: Mapping[bytes, bytes]) -> None:
        """See SharedBytes."""
        self.held |= entries


# --- keys -----------------------------------------------------------------------------------------------------------


def test_all_that_a_score_depends_on_is_in_its_key():
    """Another scorer, another way of reading, query or text: another key; the same again: the same."""
    keys = [
        *ScoreKeys("a").of("query", "windows/0", [b"text", b"other"]),
        *ScoreKeys("b").of("query", "windows/0", [b"text"]),
        *ScoreKeys("a").of("query!", "windows/0", [b"text"]),
        *ScoreKeys("a").of("query", "first/0", [b"text"]),
        *ScoreKeys("a").of("query", "windows/64", [b"text"]),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == KEY_BYTES for key in keys)
    assert ScoreKeys("a").of("query", "windows/0", [b"other", b"text"]) == [keys[1], keys[0]]


@given(st.lists(st.text(alphabet="ab", max_size=4), min_size=4, max_size=4), st.integers(1, 3))
def test_moving_a_border_makes_another_key(parts, place):
    """Where one part ends and the next begins is in the key: parts are led by their length."""
    moved = [*parts]
    if not parts[place]:
        return
    moved[place - 1], moved[place] = parts[place - 1] + parts[place][0], parts[place][1:]

    def key(identity: str, query: str, reading: str, text: str) -> bytes:
        return ScoreKeys(identity).of(query, reading, [text.encode()])[0]

    assert key(*parts) != key(*moved)


# --- bytes ----------------------------------------------------------------------------------------------------------


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, 1 << 31),
    st.integers(1, 1024),
    st.none() | st.tuples(st.integers(0, 1000), st.integers(1000, 10_000_000)),
)
def test_a_score_comes_back_as_it_was(raw, tokens, passages, best):
    """To the last bit, and marked as cached."""
    score = RawScore(raw, tokens, passages, best)
    assert unpack(pack(score)) == score._replace(cached=True)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        b"",
        pack(SCORE)[:-1],
        pack(SCORE) + b"\0",
        b"XXXX" + pack(SCORE)[4:],
        pack(SCORE._replace(raw=float("nan"))),
        pack(SCORE._replace(raw=float("inf"))),
        pack(SCORE._replace(best_passage=(90, 10))),
    ],
)
def test_what_is_no_score_is_a_miss(damaged):
    """Missing, cut short, somebody else's, or no number: none of it is believed."""
    assert unpack(damaged) is None


# --- memory and others ----------------------------------------------------------------------------------------------


async def test_kept_scores_are_found():
    """By their key, marked as cached; others are not there."""
    cache = ScoreCache(1_000_000)
    cache.put_many({b"a": SCORE})
    assert await cache.get_many([b"a", b"b"]) == {b"a": SCORE._replace(cached=True)}


async def test_the_bound_holds():
    """The least recently used go first."""
    cache = ScoreCache(2 * SCORE.nbytes)
    cache.put_many({b"a": SCORE, b"b": SCORE})
    await cache.get_many([b"a"])
    cache.put_many({b"c": SCORE})
    assert set(await cache.get_many([b"a", b"b", b"c"])) == {b"a", b"c"}


async def test_what_others_know_is_asked_once():
    """Only what this process lacks is asked for, in one go, and kept."""
    shelf = Shelf({b"b": pack(SCORE), b"bad": b"rubbish"})
    cache = ScoreCache(1_000_000, shelf)
    cache.put_many({b"a": SCORE._replace(raw=0.5)})
    found = await cache.get_many([b"a", b"b", b"bad", b"none"])
    assert {key: score.raw for key, score in found.items()} == {b"a": 0.5, b"b": 0.25}
    assert shelf.asked == [[b"b", b"bad", b"none"]]
    await cache.get_many([b"a", b"b"])
    assert len(shelf.asked) == 1
    assert unpack(shelf.held[b"a"]) == SCORE._replace(raw=0.5, cached=True)


async def test_others_who_are_late_are_not_waited_for():
    """What this process knows is there all the same."""

    class Late(Shelf):
        async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
            await asyncio.Event().wait()
            raise AssertionError

    cache = ScoreCache(1_000_000, Late())
    cache.put_many({b"a": SCORE})
    assert set(await cache.get_many([b"a", b"b"], patience_s=0.01)) == {b"a"}
