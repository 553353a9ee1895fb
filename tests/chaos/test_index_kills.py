"""
SIGKILL at random moments while a real search service writes, seals, merges and snapshots: nothing acknowledged is lost.

`TERCET_CHAOS_RUNS` is the number of kills (5 here, 200 in `make chaos-index`), `TERCET_CHAOS_SEED` where they fall.
"""

import http.client
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.search_process import SearchProcess

RUNS = int(os.environ.get("TERCET_CHAOS_RUNS", "5"))
SEED = int(os.environ.get("TERCET_CHAOS_SEED", "1"))
DIM = 24
IDS = 1500
WRITERS = 2
CATCH_UP_PATIENCE_S = 60.0
TOGETHER = 100

# So small that a second of writing seals, merges and writes snapshots many times.
SMALL = {
    "SEARCH_TAIL_ROWS": "64",
    "SEARCH_HNSW_ROWS": "300",
    "SEARCH_SNAPSHOT_OPERATIONS": "200",
    "SEARCH_SNAPSHOT_INTERVAL_S": "0.5",
    "SEARCH_MAINTENANCE_SHARE": "1",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 20 * RUNS)]


def word_of(id_, version):
    """Return a word that only this version of a document has."""
    return f"q{id_}x{version}q"


def vector_of(id_, version):
    """Return a unit vector that only this version of a document has."""
    vector = np.random.default_rng([id_, version]).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).tolist()


@dataclass
class Model:
    """What may be true of each document: one version (None: it is not there), or two while a write is unanswered."""

    versions: dict[int, set[int | None]] = field(default_factory=dict)
    seq: int = 0
    touched: set[int] = field(default_factory=set)
    next_version: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)

    def possible(self, id_):
        """Return the versions that the document may have now."""
        return self.versions.get(id_, {None})


def write_until(stop, service, model, random_, ids):
    """Write, update and delete documents among *ids*, one batch after the other, noting what was acknowledged."""
    while not stop.is_set():
        chosen = random_.sample(ids, random_.randint(1, 40))
        wait = random_.choice(["applied", "acknowledged"])
        with model.lock:
            version = model.next_version
            model.next_version += 1
        deleting = random_.random() < 0.2
        for id_ in chosen:
            model.touched.add(id_)
            model.versions[id_] = model.possible(id_) | {None if deleting else version}
        try:
            if deleting:
                body = {"ids": [str(id_) for id_ in chosen]}
                status, answer = service.call("POST", f"/collections/c/documents/delete?wait={wait}", body)
            else:
                documents = [
                    {
                        "id": str(id_),
                        "text": f"{word_of(id_, version)} and some more words",
                        "metadata": {"version": version},
                        "vector": vector_of(id_, version),
                    }
                    for id_ in chosen
                ]
                status, answer = service.call("POST", f"/collections/c/documents?wait={wait}", {"documents": documents})
        except (OSError, http.client.HTTPException):
            return
        assert status == 200, answer
        assert not answer.get("errors"), answer
        for id_ in chosen:
            model.versions[id_] = {None if deleting else version}
        with model.lock:
            model.seq = max(model.seq, answer["seq"])


def snapshots_until(stop, service, random_):
    """Ask for snapshots now and then."""
    while not stop.wait(random_.uniform(0.1, 0.6)):
        with suppress(OSError, http.client.HTTPException):
            service.call("POST", "/collections/c/snapshot")


def caught_up(service, searches):
    """Return the answers to *searches*, asked again for as long as one says that shards are catching up."""
    give_up_at = time.monotonic() + CATCH_UP_PATIENCE_S
    while True:
        results = service.ask("POST", "/search/batch", {"searches": searches})["results"]
        answers = [result.get("answer") or result["error"] for result in results]
        behind = any("catching_up" in answer.get("degraded", ()) for answer in answers)
        if not behind or time.monotonic() > give_up_at:
            return answers


def check(service, model, random_):
    """Every acknowledged document is found by id, by its word and by its vector; what is gone is not."""
    settled = list(model.versions)
    sample = sorted(model.touched) + random_.sample(settled, min(40, len(settled)))
    expected, searches = [], []
    for id_ in sample:
        status, document = service.call("GET", f"/collections/c/documents/{id_}")
        found = int(document["text"].split()[0][1:-1].split("x")[1]) if status == 200 else None
        assert found in model.possible(id_), (id_, found, model.possible(id_))
        model.versions[id_] = {found}  # From here on it is known.
        if found is None:
            continue
        # An unanswered write may be later than any answered one.
        seq = max(model.seq, document["seq"])
        for question in (
            {"query": word_of(id_, found), "mode": "lexical"},
            {"query_vector": vector_of(id_, found), "mode": "dense"},
        ):
            expected.append([str(id_)])
            searches.append({"collection": "c", "k": 1, "rerank": False, "min_seq": seq, "cache": False, **question})
    for start in range(0, len(searches), TOGETHER):
        answers = caught_up(service, searches[start : start + TOGETHER])
        for answer, ids, search in zip(answers, expected[start:], searches[start:], strict=False):
            assert [hit["id"] for hit in answer.get("hits", ())] == ids, (search, answer)
            assert "shards_partial" not in answer["degraded"], answer
    model.touched.clear()
    audits = service.ask("POST", "/collections/c/audit")
    assert audits["clean"], audits


@pytest.fixture
def service(tmp_path):
    """Yield the search service with an empty collection; whatever runs at the end is killed."""
    service = SearchProcess(tmp_path / "data", **SMALL)
    service.start()
    service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
    yield service
    service.kill()


def kill_amid_writes(service, model, random_):
    """Let writers and snapshots run for a moment, and kill the service."""
    stop = threading.Event()
    # Each writer has ids of its own, so that the order of its writes is the order of its answers.
    threads = [
        threading.Thread(
            target=write_until,
            args=(stop, service, model, random.Random(random_.random()), list(range(writer, IDS, WRITERS))),
        )
        for writer in range(WRITERS)
    ]
    threads.append(threading.Thread(target=snapshots_until, args=(stop, service, random.Random(random_.random()))))
    for thread in threads:
        thread.start()
    time.sleep(random_.uniform(0.2, 2.0))
    service.kill()
    stop.set()
    for thread in threads:
        thread.join()


def test_nothing_acknowledged_is_lost_by_kills(service):
    """After each SIGKILL the service starts again by itself, has every acknowledged write, and its audit is clean."""
    random_ = random.Random(SEED)
    model = Model()
    for run in range(RUNS):
        kill_amid_writes(service, model, random_)
        service.start()
        try:
            check(service, model, random_)
        except AssertionError as error:
            raise AssertionError(f"after kill {run + 1} of seed {SEED}: {error}") from error
    service.stop()
