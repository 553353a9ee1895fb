"""A real search service with very many collections, and with shards that are far behind."""

import os
import resource
import shutil
import statistics
import time

import pytest

from tests.trouble_service import DIM, searching, until, vector_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = pytest.mark.skipif(not os.environ.get("TERCET_SLOW"), reason="takes minutes: set TERCET_SLOW=1")
COUNTS = [100, pytest.param(1000, marks=SLOW)]
BEHIND = [10_000, pytest.param(100_000, marks=SLOW)]
HANDLES_EACH = 24  # of an open collection with two shards
MiB = 2**20


@pytest.mark.parametrize("collections", COUNTS)
def test_idle_collections_cost_no_handles_and_open_at_a_search(tmp_path, collections):
    """Idle ones are closed, so that handles, threads and memory are bounded; a search opens one again, as a restart does."""
    environ = {"SEARCH_IDLE_CLOSE_S": "2", "SEARCH_MAX_OPEN_COLLECTIONS": "20", "SEARCH_LOG_LEVEL": "error"}
    with searching(tmp_path / "data", **environ) as service:
        handles, threads, memory = service.open_files, service.threads, service.rss_bytes
        names = [f"n{number}" for number in range(collections)]
        for number, name in enumerate(names):
            service.ask("POST", "/collections", {"name": name, "dim": DIM, "shards": 2})
            service.write(range(number, number + 3), collection=name)
            if number % 50 == 49:
                until(lambda: service.open_files < handles + 20 * HANDLES_EACH, within_s=20)
        # A closed collection's threads end a moment after its files; the pools have as many as are left at the most.
        until(lambda: service.open_files <= handles + 10 and service.threads <= threads + 24)
        print(f"{collections} collections at rest: {service.open_files} handles (empty: {handles}), "
              f"{service.threads} threads, memory grew by {(service.rss_bytes - memory) / MiB:.0f} MiB")  # fmt: skip

        def opened() -> None:
            times = []
            for number in range(0, collections, max(1, collections // 25)):
                began = time.perf_counter()
                answer = service.search(number, collection=names[number])
                times.append((time.perf_counter() - began) * 1000)
                assert [hit["id"] for hit in answer["hits"]] == [f"d{number}"]
                assert answer["coverage"]["ratio"] == 1.0
            print(
                f"the search that opens a collection: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms"
            )
            assert statistics.median(times) < 5000

        opened()
        assert len(service.ask("GET", "/collections")["collections"]) == collections
        assert service.ask("GET", "/status")["collections"]
        until(lambda: service.open_files <= handles + 10)
        service.stop()
        began = time.perf_counter()
        service.start()
        print(f"restart with {collections} collections: ready after {time.perf_counter() - began:.1f} s")
        assert service.open_files < handles + 20 * HANDLES_EACH
        opened()
        service.kill()
        service.start()
        opened()
        for number in (0, collections - 1):
            assert service.ask("POST", f"/collections/{names[number]}/audit")["clean"]


def test_a_low_limit_of_handles_stops_no_collection(tmp_path):
    """Where a process may open few files unless it asks for more, as many collections are open as the settings say."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, usual[1]))
    try:
        with searching(tmp_path / "data", SEARCH_WRITE_TIMEOUT_S="5") as service:
            for number in range(40):
                service.ask("POST", "/collections", {"name": f"n{number}", "dim": DIM, "shards": 2})
                assert service.write([number], collection=f"n{number}")["applied"], number
                assert service.search(number, collection=f"n{number}")["hits"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("operations", BEHIND)
def test_a_shard_that_is_far_behind_answers_flagged_and_catches_up(tmp_path, operations):
    """Its snapshots and store gone, it reads the ledger again in bounded memory: `catching_up` first, then as ever."""
    environ = {"SEARCH_TAIL_ROWS": "4096", "SEARCH_HNSW_ROWS": "10000"}
    with searching(tmp_path / "data", **environ) as service:
        service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
        service.write(range(operations), wait="acknowledged")
        seq = service.ask("GET", "/collections/c")["seq"]
        assert service.search(1, min_seq=seq, timeout_ms=300_000)["as_of"] == seq
        followed = service.rss_bytes
        service.stop()
        shutil.rmtree(tmp_path / "data" / "shards")
        service.start()
        flagged, most = 0, 0
        while True:
            answer = service.search(operations - 1)
            most = max(most, service.rss_bytes)
            if "catching_up" not in answer["degraded"]:
                break
            flagged += 1
            assert answer["coverage"]["shards"]["catching_up"] >= 1
            assert service.call("GET", "/readyz")[0] == 200
        print(f"{flagged} flagged answers; memory {most / MiB:.0f} MiB (when it followed: {followed / MiB:.0f})")
        assert flagged > 0
        assert answer["as_of"] == seq, "an answer that lacks operations did not say so"
        assert answer["hits"][0]["id"] == f"d{operations - 1}"
        assert most < followed + 300 * MiB
        body = {"collection": "c", "mode": "dense", "query_vector": vector_of(0), "k": 1}
        assert service.ask("POST", "/search", body)["hits"][0]["id"] == "d0"
        stats = service.ask("GET", "/collections/c/stats")
        assert not any(shard["catching_up"] for shards in stats["hosts"].values() for shard in shards)
        assert service.ask("POST", "/collections/c/audit", timeout_s=600)["clean"]
