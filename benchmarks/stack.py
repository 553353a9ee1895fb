"""The stack under test: real processes, started as `tercet up` starts them, with a corpus in them; and who they stand beside."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from benchmarks.corpus import Corpus
from benchmarks.loading import MSGPACK, post
from benchmarks.servers import OURS, Running, ServerFailed, ServerSpec, running, tercet

COLLECTION = "bench"
EMBEDDING, RERANK = "embedding", "rerank"

_BULK_PATIENCE_S = 600.0
_WARM_UPS = 20
_WARM_UP = "What is a context manager?"


@dataclass(frozen=True, slots=True)
class Stack:
    """One way of answering searches: *front* is asked, and *members* are all its processes, *front* among them."""

    name: str
    front: Running
    members: Sequence[Running]

    def pause(self) -> None:
        """Stop its processes from running, the first in line first, once they have nothing left to do."""
        for member in self.members:
            member.pause()

    def resume(self) -> None:
        """Let them run again."""
        for member in reversed(self.members):
            member.resume()

    def resident_mb(self) -> float:
        """Return the resident memory of all its processes, in MB of 10^6 bytes."""
        return sum(member.resident_mb() for member in self.members)


@contextmanager
def only(stack: Stack) -> Iterator[Running]:
    """Let the processes of *stack* run for a while, and give its front."""
    stack.resume()
    try:
        yield stack.front
    finally:
        stack.pause()


def asking(server: Running, **fields: Any) -> Running:
    """Return *server* as one whose requests are searches for a text with *fields*; every server is asked for what it knows."""

    def body(texts: Sequence[str], more: Mapping[str, str]) -> bytes:
        return orjson.dumps({"query": texts[0], **fields, **more})

    return replace(server, spec=replace(server.spec, body=body))


def service_spec(name: str, module: str, **environ: str) -> ServerSpec:
    """Return the service *module* (`search`, `rerank`) in a process named *name* with *environ* added to its variables."""
    prefix = module.upper()
    return ServerSpec(
        name,
        command=lambda port: [sys.executable, "-m", f"services.{module}"],
        environ=lambda port: {f"{prefix}_LOG_FORMAT": "json", f"{prefix}_LISTEN_PORT": str(port), **environ},
        ready_path="/readyz",
        path="/search",
        body=lambda texts, fields: orjson.dumps({"query": texts[0], **fields}),
    )


def search_spec(directory: Path, embedding: str, rerank: str, name: str = OURS, **environ: str) -> ServerSpec:
    """Return the search service on the data in *directory*, with the URLs of its peers."""
    wired = {"SEARCH_EMBEDDING_URL": embedding, "SEARCH_RERANK_URL": rerank, "SEARCH_DATA_DIR": str(directory)}
    return service_spec(name, "search", **wired, SEARCH_DEFAULT_COLLECTION=COLLECTION, **environ)


def url(server: Running) -> str:
    """Return the address of *server*."""
    return f"http://{server.host}:{server.port}"


@contextmanager
def model_services(logs: Path, **environ: str) -> Iterator[dict[str, Running]]:
    """Run the embedding and the rerank service, with *environ* in both, and give them by name, running."""
    specs = [tercet(EMBEDDING, **environ), service_spec(RERANK, "rerank", **environ)]
    with running(specs, logs) as servers:
        for server in servers.values():
            server.resume()
        yield servers


@contextmanager
def our_stack(
    directory: Path, logs: Path, models: Mapping[str, Running], name: str = OURS, **environ: str
) -> Iterator[Stack]:
    """Run the search service on *directory* with *models*; give the whole, running and warm."""
    for server in models.values():
        server.resume()
    spec = search_spec(directory, url(models[EMBEDDING]), url(models[RERANK]), name, **environ)
    with running([spec], logs) as servers:
        front = servers[spec.name]
        front.resume()
        yield Stack(name, front, [front, *models.values()])


def load(front: Running, corpus: Corpus) -> None:
    """
    Write *corpus* with its vectors into a new collection and wait until it is searched and nothing is left to build.

    Raises:
        ServerFailed: The service runs another model than the one that made the vectors, or a write failed.
    """
    made = post(front, "/collections", orjson.dumps({"name": COLLECTION}), "application/json")
    if made["fingerprint"] != corpus.fingerprint:
        raise ServerFailed(f"the vectors are {corpus.fingerprint}'s, and the service runs {made['fingerprint']}")
    reply = post(front, f"/collections/{COLLECTION}/documents?wait=applied", corpus.packed(), MSGPACK)
    if reply["accepted"] != len(corpus.texts) or not reply["applied"]:
        raise ServerFailed(f"{len(corpus.texts)} documents were sent, and the service says: {str(reply)[:500]}")
    front.wait_until_idle(_BULK_PATIENCE_S, quiet_s=3.0)
    post(front, f"/collections/{COLLECTION}/snapshot", b"", "application/json")


def prepared(corpus: Corpus, scratch: Path) -> Path:
    """Return a directory of search data with *corpus* in it, to be searched by one process after the other."""
    directory = scratch / "data"
    with ExitStack() as stack:
        models = stack.enter_context(model_services(scratch))
        ours = stack.enter_context(our_stack(directory, scratch, models, SEARCH_MAINTENANCE_SHARE="1.0"))
        load(ours.front, corpus)
        warm_up(ours.front)
    return directory


def warm_up(front: Running) -> None:
    """Ask in full until the answer is whole: the first ones open connections and shards. Raises ServerFailed if it never is."""
    reply: dict[str, Any] = {}
    for _ in range(_WARM_UPS):
        body = {"query": _WARM_UP, "rerank": True, "cache": False, "timeout_ms": 60_000}
        reply = post(front, "/search", orjson.dumps(body), "application/json")
        if not reply.get("degraded"):
            return
    raise ServerFailed(f"the stack's answer is degraded before anything failed: {reply['degraded']}")
