"""Resharding a real service by a copy and an alias, while it is searched and written."""

import random
import threading
import time

import pytest

from tests.trouble_service import DIM, TroubledService, document, searching, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Searcher(threading.Thread):
    """Searches `live` over and over for documents that are never changed; what goes wrong is in *faults*."""

    def __init__(self, service: TroubledService, numbers: range) -> None:
        super().__init__()
        self.service = service
        self.numbers = numbers
        self.over = threading.Event()
        self.faults: list[object] = []
        self.answers = 0

    def run(self) -> None:
        """Search until told to stop."""
        random_ = random.Random(1)
        while not self.over.is_set():
            number = random_.choice(self.numbers)
            try:
                answer = self.service.search(number, collection="live", k=3)
            except Exception as error:
                self.faults.append(error)
                continue
            self.answers += 1
            if not answer["hits"] or answer["hits"][0]["id"] != f"d{number}":
                self.faults.append((number, answer))

    def stop(self) -> None:
        """End it."""
        self.over.set()
        self.join()


def copied(service: TroubledService, target: str) -> dict:
    """Wait until the copy is done, and return how it went."""
    until(lambda: service.ask("GET", f"/collections/{target}/reindex")["state"] != "copying", within_s=120)
    found = service.ask("GET", f"/collections/{target}/reindex")
    assert found["state"] == "done", found
    return found


def contents(service: TroubledService, name: str, digits: int = 6) -> dict[str, tuple]:
    """Return text, metadata and vector, rounded, of all documents by id."""
    found, cursor = {}, None
    while True:
        path = f"/collections/{name}/documents?limit=500&vector=true" + (f"&cursor={cursor}" if cursor else "")
        page = service.ask("GET", path)
        found |= {
            each["id"]: (each["text"], each["metadata"], [round(x, digits) for x in each["vector"]])
            for each in page["documents"]
        }
        if (cursor := page.get("cursor")) is None:
            return found


def test_resharding_under_load_fails_no_search(tmp_path):
    """A copy with other shards takes the alias while searches and writes go on: no search fails, and all is in the copy."""
    with searching(tmp_path / "data") as service:
        service.ask("POST", "/collections", {"name": "old", "dim": DIM, "shards": 2})
        service.write(range(2000), collection="old", wait="acknowledged")
        service.ask("POST", "/aliases", {"changes": {"live": "old"}})
        seq = service.ask("GET", "/collections/old")["seq"]
        service.search(0, collection="old", min_seq=seq, timeout_ms=60_000)
        searcher = Searcher(service, range(500))
        searcher.start()
        changed: dict[int, int | None] = {}
        over = threading.Event()

        def change() -> None:
            version = 1
            while not over.is_set():
                numbers = range(500 + version % 40 * 10, 505 + version % 40 * 10)
                service.write(list(numbers), version, collection="old")
                gone = f"d{1000 + version}"
                service.ask("POST", "/collections/old/documents/delete", {"ids": [gone]})
                changed.update(dict.fromkeys(numbers, version))
                changed[1000 + version] = None
                version += 1

        changing = threading.Thread(target=change)
        changing.start()
        try:
            time.sleep(0.3)
            service.ask("POST", "/collections/old/reindex", {"target": "new", "shards": 5})
            copied(service, "new")
        finally:
            over.set()
            changing.join()
        assert len(changed) > 10
        # The writers have stopped: what they did since the copy follows, then the alias moves.
        service.ask("POST", "/collections/old/reindex", {"target": "new", "shards": 5, "alias": "live"})
        copied(service, "new")
        assert service.ask("GET", "/aliases")["aliases"] == {"live": "new"}
        before = searcher.answers
        until(lambda: searcher.answers > before + 20)
        searcher.stop()
        assert not searcher.faults, searcher.faults[:3]
        assert searcher.answers > 30
        assert service.ask("GET", "/collections/live")["shards"] == 5
        assert contents(service, "new") == contents(service, "old")
        for number, version in list(changed.items())[-20:]:
            status, kept = service.call("GET", f"/collections/live/documents/d{number}")
            assert (status == 404) if version is None else (kept["metadata"]["version"] == version)
        assert service.ask("POST", "/collections/new/audit")["clean"]
        assert service.call("DELETE", "/collections/old")[0] == 204
        assert service.search(1, collection="live")["hits"][0]["id"] == "d1"


def test_a_copy_that_is_killed_goes_on_after_a_restart(tmp_path):
    """Killed amid the copy and asked again, it comes to the same as one that was never interrupted."""
    with searching(tmp_path / "data") as service:
        service.ask("POST", "/collections", {"name": "old", "dim": DIM, "shards": 2})
        service.write(range(3000), collection="old", wait="acknowledged")
        ask = {"target": "new", "shards": 3, "alias": "live"}
        service.ask("POST", "/collections/old/reindex", ask)
        until(lambda: service.ask("GET", "/collections/new")["documents"] > 0)
        service.kill()
        service.start()
        service.ask(
            "POST", "/collections/old/documents/delete", {"ids": [f"d{number}" for number in range(0, 3000, 100)]}
        )
        service.write([50, 51], 1, collection="old")
        service.ask("POST", "/collections/old/reindex", ask)
        copied(service, "new")
        assert contents(service, "new") == contents(service, "old")
        assert service.search(50, 1, collection="live")["hits"][0]["id"] == "d50"
        assert service.ask("POST", "/collections/new/audit")["clean"]


def test_a_switch_back_and_forth_always_answers_from_one_of_both(tmp_path):
    """While an alias moves between two collections, each answer is wholly of one of them."""
    with searching(tmp_path / "data") as service:
        for name, version in (("a", 1), ("b", 2)):
            service.ask("POST", "/collections", {"name": name, "dim": DIM, "shards": 2})
            documents = [document(number, version, text=f"shared words {number}") for number in range(100)]
            service.ask("POST", f"/collections/{name}/documents", {"documents": documents})
        service.ask("POST", "/aliases", {"changes": {"live": "a"}})
        over = threading.Event()
        faults: list[object] = []
        seen: set[int] = set()

        def ask() -> None:
            body = {"collection": "live", "query": "shared words", "mode": "lexical", "rerank": False, "k": 50}
            while not over.is_set():
                status, answer = service.call("POST", "/search", body)
                versions = {hit["metadata"]["version"] for hit in answer["hits"]} if status == 200 else set()
                seen.update(versions)
                if len(versions) != 1 or len(answer["hits"]) != 50:
                    faults.append((status, versions, answer.get("error")))

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        for turn in range(60):
            name, version = (("b", 2), ("a", 1))[turn % 2]
            service.ask("POST", "/aliases", {"changes": {"live": name}})
            # A search that begins after the switch was acknowledged is of the new one, also from the cache.
            body = {"collection": "live", "query": "shared words", "mode": "lexical", "rerank": False, "k": 50}
            answer = service.ask("POST", "/search", body)
            assert {hit["metadata"]["version"] for hit in answer["hits"]} == {version}
        over.set()
        for thread in asking:
            thread.join()
        assert not faults, faults[:3]
        assert seen == {1, 2}


def test_a_copy_has_the_vectors_to_the_letter(tmp_path):
    """Own vectors are copied bit by bit, so that a write of the same documents to the copy changes nothing."""
    with searching(tmp_path / "data") as service:
        service.ask("POST", "/collections", {"name": "old", "dim": DIM, "shards": 2})
        service.write(range(500), collection="old")
        service.ask("POST", "/collections/old/reindex", {"target": "new", "shards": 3})
        copied(service, "new")
        again = service.write(range(500), collection="new")
        assert again["unchanged"] == 500
        assert contents(service, "new", 12) == contents(service, "old", 12)
