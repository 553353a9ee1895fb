"""A whole deployment as real processes, each part behind a proxy, and the ways to hurt and to mend a part."""

import itertools
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tercet.demo.corpus import demo_documents
from tests.chaos.matrix import UNRESOLVED
from tests.chaos.names import name_of
from tests.fault_proxy import FaultProxy, Mode
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.search_process import SearchProcess, ServiceProcess

COLLECTION: Final = "notes"
DOCUMENTS: Final = 300
QUESTIONS: Final = 400
_MAX_TEXT_CHARS: Final = 400
_QUESTION_WORDS: Final = 9
_NOWHERE: Final = "http://127.0.0.1:1"
# Long enough that the deployment is not ended by a frozen part, short enough that it ends at once otherwise.
_GRACE_S: Final = "3"
_PROXY_FAULTS: Final[Mapping[str, Mode]] = {
    "slow": "slow",
    "garbage": "garbage",
    "raw bytes": "raw",
    "reset": "reset",
    "100 MB": "huge",
    "drip": "drip",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A process that can fail, and the proxy through which all others reach it."""

    proxy: FaultProxy
    kill: Callable[[], None]
    start: Callable[[], None]
    freeze: Callable[[], None]
    thaw: Callable[[], None]

    def hurt(self, fault: str) -> None:
        """Let *fault* happen to it; when this returns, it has."""
        if fault == "killed":
            self.kill()
            self.proxy.behave("refuse")  # The proxy would still take connections for it.
        elif fault == "frozen":
            self.freeze()
        else:
            self.proxy.behave(_PROXY_FAULTS[fault])

    def mend(self, fault: str) -> None:
        """Undo *fault*; when this returns, it answers."""
        if fault == "killed":
            self.proxy.behave("pass")
            self.start()
        elif fault == "frozen":
            self.thaw()
        else:
            self.proxy.behave("pass")


class Deployment:
    """
    PostgreSQL, both model services, three shard nodes (the first two are replicas of one), a fallback node, search before
    them in one process or as a router, and a Redis if *redis* is given; the collection has two shards.

    Use it as a context manager. `search` and `oracle` start further search processes when they are first asked for.
    """

    def __init__(
        self, place: Path, postgres: PostgresServer, redis: RedisServer | None, environ: Mapping[str, str] = {}
    ) -> None:
        self._place = place
        self._postgres = postgres
        self._redis = redis
        self._environ = dict(environ)
        self._names = place / "names.json"
        self._stack = ExitStack()
        self._searches: dict[str, SearchProcess] = {}
        self.parts: dict[str, Part] = {}
        self.questions: list[str] = []
        self.numbers = itertools.count()  # of the searches made, so that no two are alike
        self.answers: dict[tuple[str, str], dict[int, frozenset[str]]] = {}  # of oracles, by question

    def __enter__(self) -> "Deployment":
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        self._stack = stack
        ledger = self._server_part("ledger", self._postgres.port, self._postgres, kill=self._postgres.crash)
        self._ledger_url = f"postgresql://postgres@127.0.0.1:{ledger.port}/postgres?schema=c{uuid.uuid4().hex[:12]}"
        if self._redis is not None:
            proxy = self._server_part("redis", self._redis.port, self._redis, kill=self._redis.kill)
            self._environ["REDIS_URL"] = f"redis://127.0.0.1:{proxy.port}/0"
        models = {
            "embedding": ServiceProcess("embedding", self._log("embedding"), **self._environ),
            # Which model reranks is of no account here: what is looked at is what becomes of its scores.
            "rerank": ServiceProcess("rerank", self._log("rerank"), RERANK_MODEL="fake", **self._environ),
        }
        places = {"node 0": 0, "replica": 0, "node 1": 1}
        nodes = {
            name: self._node(name, "shard", SEARCH_SHARD_NODE=str(number), SEARCH_SHARD_NODE_COUNT="2")
            for name, number in places.items()
        }
        processes: dict[str, ServiceProcess] = {**models, **nodes, "fallback": self._node("fallback", "fallback")}
        for name, process in processes.items():
            stack.callback(_end, process)
            process.spawn()
            proxy = stack.enter_context(FaultProxy(process.port))
            self.parts[name] = Part(proxy, process.kill, process.start, process.freeze, process.thaw)
        for process in processes.values():
            process.until_ready()
        self.write()

    def _server_part(
        self, name: str, port: int, server: PostgresServer | RedisServer, kill: Callable[[], None]
    ) -> FaultProxy:
        proxy = self._stack.enter_context(FaultProxy(port))
        self.parts[name] = Part(proxy, kill, server.start, server.freeze, server.thaw)
        return proxy

    def _node(self, name: str, role: str, **environ: str) -> SearchProcess:
        own = {"SEARCH_ROLE": role, "SEARCH_LEDGER_URL": self._ledger_url, "SEARCH_FOLLOW_INTERVAL_S": "0.5"}
        mixed = {**self._environ, **own, "SEARCH_SHUTDOWN_GRACE_S": _GRACE_S, **environ}
        return SearchProcess(self._place / name.replace(" ", "-"), self._log(name), **mixed)

    def _log(self, name: str) -> Path:
        return self._place / "logs" / f"{name.replace(' ', '-')}.log"

    def search(self, shards: str) -> SearchProcess:
        """Return search with its shards `embedded` or `remote`."""
        return self._searching(shards, "all") if shards == "embedded" else self.searching(shards)

    def searching(self, name: str, **environ: str) -> SearchProcess:
        """Return a router over the nodes with settings of its own, by a name of its own."""
        urls = self._urls()
        return self._searching(name, "router", **self._nodes(urls), SEARCH_FALLBACK=urls["fallback"], **environ)

    def nameless(self, shards: str, parts: Sequence[str]) -> SearchProcess:
        """Return a search process, just started, that looks up its peers' names and does not find those of *parts*."""
        self._names.write_text(json.dumps({name_of(name): "127.0.0.1" for name in self.parts if name not in parts}))
        name = f"search names {next(self.numbers)}"
        urls = {part: f"http://{name_of(part)}:{self.parts[part].proxy.port}" for part in self.parts}
        if shards == "embedded":
            process = self._make(name, "all", urls)
        else:
            process = self._make(name, "router", urls, **self._nodes(urls), SEARCH_FALLBACK=urls["fallback"])
        process.command = [sys.executable, "-m", "tests.chaos.names", str(self._names), "services.search"]
        self._stack.callback(_end, process)
        process.start()
        ask = {"query": "any", "collection": COLLECTION, "mode": "lexical", "rerank": False, "cache": False}
        while "catching_up" in process.ask("POST", "/search", ask)["degraded"]:
            time.sleep(0.1)
        return process

    def hurt(self, parts: Sequence[str], fault: str) -> None:
        """Let *fault* happen to *parts*, one after the other. (Names are unknown to a search process from its start.)"""
        for name in parts if fault != UNRESOLVED else ():
            self.parts[name].hurt(fault)

    def mend(self, parts: Sequence[str], fault: str) -> None:
        """Undo *fault*; when this returns, all the parts answer, and are found."""
        if fault == UNRESOLVED:
            self._names.write_text(json.dumps({name_of(name): "127.0.0.1" for name in self.parts}))
            return
        for name in parts:
            self.parts[name].mend(fault)

    def oracle(self, kind: str) -> SearchProcess:
        """
        Return a router that does what is left to do when parts are gone, while the others of the deployment are well.

        `fallback of 1`, `fallback of 0`, `fallback of all`: the fallback index answers for those nodes. `without 1`: nobody
        does.
        """
        gone = {"fallback of 1": (1,), "fallback of 0": (0,), "fallback of all": (0, 1), "without 1": (1,)}[kind]
        urls = self._urls()
        fallback = "off" if kind.startswith("without") else urls["fallback"]
        return self._searching(kind, "router", **self._nodes(urls, gone), SEARCH_FALLBACK=fallback)

    def _urls(self) -> dict[str, str]:
        return {name: part.proxy.url for name, part in self.parts.items()}

    def _nodes(self, urls: Mapping[str, str], gone: Sequence[int] = ()) -> dict[str, str]:
        nodes = [f"{urls['node 0']},{urls['replica']}", urls["node 1"]]
        return {"SEARCH_SHARD_NODES": ";".join(_NOWHERE if n in gone else node for n, node in enumerate(nodes))}

    def _searching(self, name: str, role: str, **environ: str) -> SearchProcess:
        if name not in self._searches:
            process = self._make(f"search {name}", role, self._urls(), **environ)
            self._stack.callback(_end, process)
            process.start()
            self._searches[name] = process
        return self._searches[name]

    def _make(self, name: str, role: str, urls: Mapping[str, str], **environ: str) -> SearchProcess:
        peers = {f"SEARCH_{part.upper()}_URL": urls[part] for part in ("embedding", "rerank")}
        return self._node(name, role, **peers, **environ)

    def write(self) -> None:
        """Make the collection, and the questions to ask of it."""
        found = list(itertools.islice(texts(), DOCUMENTS + QUESTIONS))
        documents = [
            {"id": id_, "title": title, "text": text, "metadata": {}} for id_, title, text in found[:DOCUMENTS]
        ]
        self.questions = [" ".join(text.split()[:_QUESTION_WORDS]) for _, _, text in found[DOCUMENTS:]]
        self.search("remote").ask("POST", "/collections", {"name": COLLECTION, "shards": 2})
        reply = self.search("remote").ask("POST", f"/collections/{COLLECTION}/documents", {"documents": documents})
        assert reply["applied"], reply


def texts() -> Iterator[tuple[str, str, str]]:
    """Yield id, title and a text of some length, no two texts alike, of Python's own documentation."""
    seen = set()
    for document in demo_documents():
        text = " ".join(document["text"].split())[:_MAX_TEXT_CHARS]
        if len(text.split()) > _QUESTION_WORDS and text[:60] not in seen:
            seen.add(text[:60])
            yield document["id"], document.get("title", ""), text


def _end(process: ServiceProcess) -> None:
    if process.process is not None and process.process.poll() is None:
        process.kill()
