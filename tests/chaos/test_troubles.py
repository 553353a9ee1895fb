"""What no cell of the matrix is: everything down at once, a Redis in trouble of its own kinds, and a clock that jumps."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.chaos.engine import request
from tests.chaos.faults import COLLECTION, Deployment
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.search_process import SearchProcess

ASKED = 12
ROUNDS = 6
PATIENCE_S = 20.0
HOUR_S = 3600
NODES = ("node 0", "replica", "node 1", "fallback")
LIBFAKETIME = next((str(path) for path in Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1")), None)

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def deployment(
    postgres_server: PostgresServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Yield a deployment with Redis."""
    with Deployment(tmp_path_factory.mktemp("deployment"), postgres_server, redis_server) as running:
        yield running


def asking(search: SearchProcess) -> Ask:
    """Return what asks one question of *search*: the status and the JSON."""

    def ask(question: str, **options: Any) -> tuple[int, Any]:
        return search.call("POST", "/search", {**request(question), "timeout_ms": 1500, **options})

    return ask


def ids(reply: Any) -> list[str]:
    return [hit["id"] for hit in reply["hits"]]


def until(holds: Callable[[], bool]) -> None:
    """Wait until *holds*; an assertion fails when it does not in time."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def test_with_everything_down_the_last_good_answer_comes_flagged(deployment: Deployment):
    """No shard can be asked: what was answered before comes again, flagged; what was not is a 503 with a time to retry."""
    search = deployment.search("remote")
    ask = asking(search)
    known, new = deployment.questions[:ASKED], deployment.questions[ASKED : 2 * ASKED]
    until(lambda: ask(known[0])[1].get("degraded") == [])
    before = {question: ids(ask(question)[1]) for question in known}
    # The collection moves, so that nothing that was kept is fresh any more.
    moved = {"documents": [{"id": "moved", "text": "a document that moves the collection on"}]}
    assert search.ask("POST", f"/collections/{COLLECTION}/documents", moved)["applied"]
    try:
        deployment.hurt(NODES, "killed")
        for question in known:
            status, reply = ask(question)
            assert (status, reply.get("degraded")) == (200, ["stale"]), reply
            assert reply["cache"]["stale"] is True
            assert reply["cache"]["hit"] is True
            assert ids(reply) == before[question]
            assert ask(question, require={"fresh": True})[0] == 503
        for question in new:
            assert ask(question)[0] == 503
    finally:
        deployment.mend(NODES, "killed")
        search.ask("POST", f"/collections/{COLLECTION}/documents/delete", {"ids": ["moved"]})
    until(lambda: ask(known[0])[1].get("degraded") == [])


@contextmanager
def again_and_again(action: Callable[[], object]) -> Iterator[None]:
    """Do *action* all the time, in a thread, while the block runs."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(0.02):
            action()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def fill(client: redis.Redis) -> None:
    """Leave no memory for more, so that what is there is evicted."""
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 20_000)


def replace_with_lists(client: redis.Redis) -> None:
    """Put a value of another type under every key."""
    for key in client.scan_iter(count=1000):
        with client.pipeline() as steps:
            steps.delete(key).rpush(key, "a list").execute()


def refuse_writes_for_want_of_memory(client: redis.Redis) -> None:
    """Leave no memory, and evict nothing."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)


TROUBLES: dict[str, tuple[Callable[[redis.Redis], object], bool]] = {
    "evicting": (fill, False),
    "full": (refuse_writes_for_want_of_memory, False),
    "read-only": (lambda client: client.replicaof("127.0.0.1", "1"), False),
    "wrong type": (replace_with_lists, True),
    "flushed under load": (lambda client: client.flushall(), True),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_redis_in_trouble_costs_no_answer(trouble: str, deployment: Deployment, redis_server: RedisServer):
    """A Redis that answers, if not as it should, changes no hit; at most the reply says that it is out of reach."""
    # Without a cache of its own in memory it asks Redis every time.
    search = deployment.searching("no memory", SEARCH_CACHE_BYTES="0")
    ask = asking(search)
    questions = deployment.questions[:ASKED]
    expected = {question: ids(ask(question, cache=False)[1]) for question in questions}
    make, always = TROUBLES[trouble]
    with redis.Redis.from_url(redis_server.url) as client, ExitStack() as stack:
        stack.callback(client.flushall)
        stack.callback(client.config_set, "maxmemory", 0)
        stack.callback(client.replicaof, "NO", "ONE")
        for question in questions:
            ask(question)
        make(client)
        if always:
            stack.enter_context(again_and_again(lambda: make(client)))
        for question in itertools.chain.from_iterable([questions] * ROUNDS):
            status, reply = ask(question)
            assert status == 200, reply
            assert set(reply["degraded"]) <= {"cache_unavailable"}
            assert ids(reply) == expected[question]
    until(lambda: ask(questions[0])[1]["cache"]["hit"])


@pytest.mark.skipif(LIBFAKETIME is None, reason="there is no libfaketime")
@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_clock_that_jumps_changes_no_answer(jump_s: int, deployment: Deployment, tmp_path: Path):
    """When the wall clock of search jumps, kept answers are true or made anew, with no flag; deadlines stand still."""
    assert LIBFAKETIME is not None
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    faked = {
        "LD_PRELOAD": LIBFAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    search = deployment.searching(f"jump {jump_s}", **faked)
    ask = asking(search)
    questions = deployment.questions[:ASKED]
    until(lambda: ask(questions[0])[1].get("degraded") == [])
    before = {question: ids(ask(question)[1]) for question in questions}
    clock.write_text(f"{jump_s:+d}\n")
    for question in (*questions, *questions):
        status, reply = ask(question)
        assert (status, reply.get("degraded")) == (200, []), reply
        assert ids(reply) == before[question]
        assert (reply["cache"].get("age_ms") or 0) >= 0
    document = {"documents": [{"id": f"jump {jump_s}", "text": "written after the clock has jumped"}]}
    seq = search.ask("POST", f"/collections/{COLLECTION}/documents", document)["seq"]
    _, reply = ask("written after the clock has jumped", min_seq=seq)
    assert ids(reply)[0] == f"jump {jump_s}"
    search.ask("POST", f"/collections/{COLLECTION}/documents/delete", {"ids": [f"jump {jump_s}"]})
