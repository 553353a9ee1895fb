"""
Real services of every kind with a real Prometheus that scrapes them: what dashboards and rules are proved on.

One embedding and one rerank process, a router, a shard node of two replicas and another of one, a fallback node, PostgreSQL
and Redis; API keys, so that there are series by key. All of it is for minutes, on one machine, with little load.
"""

import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.faults import texts
from tests.integration.test_keys import bearer, write_keys
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.search_process import SearchProcess, ServiceProcess

RULES = Path(__file__).parents[2] / "deploy" / "observability" / "rules"
COLLECTION = "notes"
SCRAPE_S = 1
# What a rule waits for before it is an alert is proved by promtool; here it would only take time.
SHORT_FOR = "2s"


class ObservedStack:
    """The processes, by the name of their job and their number in it. Use it as a context manager."""

    def __init__(self, place: Path, postgres: PostgresServer, redis: RedisServer) -> None:
        self._place = place
        self._ledger = f"{postgres.url()}?schema=observed"
        self._environ = {"REDIS_URL": redis.url}
        self._stack = ExitStack()
        self.jobs: dict[str, list[ServiceProcess]] = {}

    def __enter__(self) -> "ObservedStack":
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        keys = str(
            write_keys(
                self._place / "keys.json",
                website={"scopes": ["search"]},
                loader={"scopes": ["search", "write", "embed", "rerank"]},
                searcher={"scopes": ["embed", "rerank"]},
            )
        )
        models = {
            name: ServiceProcess(name, self._log(name), **self._environ, **{f"{name.upper()}_API_KEYS_FILE": keys})
            for name in ("embedding", "rerank")
        }
        nodes = [self._node(f"shard-{node}-{replica}", "shard", node) for node, replica in ((0, 0), (0, 1), (1, 0))]
        fallback = self._node("fallback-0", "fallback")
        self.jobs = {**{name: [process] for name, process in models.items()}, "shard": nodes, "fallback": [fallback]}
        self._start(stack)
        router = self._search(
            "search-0",
            "router",
            SEARCH_SHARD_NODES=f"{nodes[0].url},{nodes[1].url};{nodes[2].url}",
            SEARCH_FALLBACK=fallback.url,
            SEARCH_EMBEDDING_URL=models["embedding"].url,
            SEARCH_RERANK_URL=models["rerank"].url,
            SEARCH_PEER_API_KEY="searcher",
            SEARCH_API_KEYS_FILE=keys,
            SEARCH_DEFAULT_COLLECTION=COLLECTION,
            SEARCH_RECALL_SAMPLE_RATIO="1",
        )
        self.jobs["search"] = [router]
        self._start(stack)

    def _start(self, stack: ExitStack) -> None:
        fresh = [process for process in self.processes() if process.process is None]
        for process in fresh:
            stack.callback(_end, process)
            process.spawn()
        for process in fresh:
            process.until_ready()

    def _search(self, name: str, role: str, **environ: str) -> SearchProcess:
        own = {"SEARCH_ROLE": role, "SEARCH_LEDGER_URL": self._ledger}
        return SearchProcess(self._place / name, self._log(name), **self._environ, **own, **environ)

    def _node(self, name: str, role: str, node: int = 0) -> SearchProcess:
        which = {"SEARCH_SHARD_NODE": str(node), "SEARCH_SHARD_NODE_COUNT": "2"} if role == "shard" else {}
        return self._search(name, role, SEARCH_FOLLOW_INTERVAL_S="0.5", SEARCH_SNAPSHOT_INTERVAL_S="5", **which)

    def _log(self, name: str) -> Path:
        return self._place / "logs" / f"{name}.log"

    def processes(self) -> Iterator[ServiceProcess]:
        """Yield all processes."""
        return itertools.chain.from_iterable(self.jobs.values())

    def scrape(self) -> dict[tuple[str, str], str]:
        """Return what each process exports now, by its job and `job-number`."""
        found = {}
        for job, processes in self.jobs.items():
            for number, process in enumerate(processes):
                with urllib.request.urlopen(f"{process.url}/metrics", timeout=10) as reply:
                    found[job, f"{job}-{number}"] = reply.read().decode()
        return found


class Load:
    """A little of all kinds of work, from a few threads, until it is stopped; its failures are the services' to count."""

    def __init__(self, stack: ObservedStack) -> None:
        found = list(itertools.islice(texts(), 600))
        self._documents = [
            {"id": id_, "title": title, "text": text, "metadata": {}} for id_, title, text in found[:400]
        ]
        self._questions = [" ".join(text.split()[:9]) for _, _, text in found]
        self._stack = stack
        self._over = threading.Event()
        kinds: Sequence[Callable[[int], None]] = (self._ask_anew, self._ask_again, self._write, self._use_models)
        self._threads = [threading.Thread(target=self._repeat, args=(kind,), daemon=True) for kind in kinds]

    def __enter__(self) -> "Load":
        search = self._stack.jobs["search"][0]
        search.ask("POST", "/collections", {"name": COLLECTION, "shards": 2}, headers=bearer("loader"))
        body = {"documents": self._documents[:300]}
        path = f"/collections/{COLLECTION}/documents"
        search.ask("POST", path, body, headers=bearer("loader") | {"x-deadline-ms": "170000"}, timeout_s=180)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, kind: Callable[[int], None]) -> None:
        for number in itertools.count():
            if self._over.wait(0.2):
                return
            with suppress(OSError):
                kind(number)

    def _send(self, job: str, path: str, body: Any, key: str) -> None:
        self._stack.jobs[job][0].call("POST", path, body, headers=bearer(key), timeout_s=10)

    def _ask_anew(self, number: int) -> None:
        question = self._questions[number % len(self._questions)]
        self._send("search", "/search", {"query": f"{question} {number}"}, "website")

    def _ask_again(self, number: int) -> None:
        again = {"query": self._questions[number % 3], "max_stale_s": 60}
        self._send("search", "/search", again, "website")
        self._send("search", "/search/batch", {"searches": [again, again]}, "website")
        self._send("search", "/msearch", again, "website")

    def _write(self, number: int) -> None:
        document = {**self._documents[300 + number % 100], "id": f"w{number}"}
        self._send("search", f"/collections/{COLLECTION}/documents", {"documents": [document]}, "loader")

    def _use_models(self, number: int) -> None:
        text = self._questions[number % 50]
        self._send("embedding", "/embed", {"inputs": [text, f"{text} {number}"], "input_type": "document"}, "loader")
        self._send("rerank", "/rerank", {"query": text, "documents": self._questions[number % 50 :][:5]}, "loader")


class Prometheus:
    """A real Prometheus on the rules of the product, each alert's `for` cut short, that scrapes every second."""

    def __init__(self, place: Path, targets: Mapping[str, Sequence[str]]) -> None:
        executable = shutil.which("prometheus")
        assert executable is not None, "there is no prometheus: apt-get install prometheus"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        config = place / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config(place, targets)))
        options = [f"--config.file={config}", f"--storage.tsdb.path={place / 'tsdb'}"]
        self._command = [executable, *options, f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"]
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def _config(place: Path, targets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        short = place / "rules"
        short.mkdir()
        for file in sorted(RULES.glob("*.yaml")):
            rules = yaml.safe_load(file.read_text())
            for rule in (rule for group in rules["groups"] for rule in group["rules"]):
                if "for" in rule:
                    rule["for"] = SHORT_FOR
            (short / file.name).write_text(yaml.safe_dump(rules))
        jobs = [{"job_name": job, "static_configs": [{"targets": list(found)}]} for job, found in targets.items()]
        often = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        return {"global": often, "rule_files": [f"{short}/*.yaml"], "scrape_configs": jobs}

    def __enter__(self) -> "Prometheus":
        self._process = subprocess.Popen(self._command)
        self.until(lambda: bool(self._api("status/buildinfo")), within_s=30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and values of *expr* now."""
        found = self._api("query", query=expr)
        samples = (
            [({}, found["result"])]
            if found["resultType"] == "scalar"
            else [(s["metric"], s["value"]) for s in found["result"]]
        )
        return [(labels, float(value[1])) for labels, value in samples]

    def firing(self) -> list[dict[str, str]]:
        """Return the labels of the alerts that fire now."""
        return [alert["labels"] for alert in self._api("alerts")["alerts"] if alert["state"] == "firing"]

    def summary(self, name: str) -> str:
        """Return what a firing alert says, as it was rendered."""
        return next(
            a["annotations"]["summary"] for a in self._api("alerts")["alerts"] if a["labels"]["alertname"] == name
        )

    def rule_errors(self) -> list[str]:
        """Return the rules whose last evaluation failed, and why."""
        rules = (rule for group in self._api("rules")["groups"] for rule in group["rules"])
        return [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] == "err"]

    def until(self, holds: Callable[[], bool], *, within_s: float) -> float:
        """Wait until *holds*, and return how long that took; it fails when it does not in time."""
        began = time.monotonic()
        while time.monotonic() < began + within_s:
            with suppress(OSError):
                if holds():
                    return time.monotonic() - began
            time.sleep(0.2)
        raise AssertionError(f"not within {within_s} s; firing: {self.firing()}")

    def _api(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return json.load(reply)["data"]


def _end(process: ServiceProcess) -> None:
    if process.process is not None and process.process.poll() is None:
        process.kill()
