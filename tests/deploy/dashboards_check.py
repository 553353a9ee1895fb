"""
`make dashboards-check`: real services, a real Prometheus, and every query of every panel asked of it.

Then the embedding service is killed: the alerts that should fire do, the others do not, and they end when it is back.
`--record` keeps what was scraped for the tests (observing.py). It prints what it sees, and ends with 1 if something is missing.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.observed import Load, ObservedStack, Prometheus
from tests.deploy.observing import INTERVAL, WITHOUT_A_GPU, queries, write_record
from tests.postgres_server import PostgresServer, postgres_binaries
from tests.redis_server import RedisServer, redis_executable

WARM_UP_S = 15.0
ALERT_WITHIN_S = 90.0
EXPECTED_OF_A_KILL = ("ServiceDown", "InstanceDown", "BreakerOpen")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the scrapes for the tests")
    parser.add_argument("--load-s", type=float, default=60.0, help="seconds of load before the queries are asked")
    options = parser.parse_args(arguments)
    binaries, redis_path = postgres_binaries(), redis_executable()
    assert binaries is not None, "there is no PostgreSQL to start"
    assert redis_path is not None, "there is no Redis to start"
    with tempfile.TemporaryDirectory() as place:
        postgres, redis = PostgresServer(binaries), RedisServer(redis_path, Path(place))
        try:
            postgres.start()
            redis.start()
            with ObservedStack(Path(place), postgres, redis) as stack:
                return _observe(stack, Path(place), options.load_s, record=options.record)
        finally:
            redis.kill()
            postgres.remove()


def _observe(stack: ObservedStack, place: Path, load_s: float, *, record: bool) -> int:
    targets = {job: [process.url.removeprefix("http://") for process in found] for job, found in stack.jobs.items()}
    directory = place / "prometheus"
    directory.mkdir()
    with Prometheus(directory, targets) as prometheus, Load(stack):
        time.sleep(WARM_UP_S)
        first = stack.scrape()
        # One of two replicas goes for a moment: there are series of calls that failed, and answers stay whole.
        replica = stack.jobs["shard"][1]
        replica.kill()
        time.sleep(3)
        replica.start()
        time.sleep(load_s)
        if record:
            write_record(first, stack.scrape())
        empty = _ask_all(prometheus)
        errors = prometheus.rule_errors()
        print(f"rules that failed: {errors or 'none'}; firing under load: {_names(prometheus) or 'none'}")
        _kill_and_recover(stack, prometheus)
    return 1 if empty or errors else 0


def _ask_all(prometheus: Prometheus) -> list[str]:
    """Print how many series each query has, and one of them; return the queries without data."""
    empty = []
    for dashboard, panel, expr in queries():
        found = [
            (labels, value)
            for labels, value in prometheus.query(expr.replace(INTERVAL, "30s"))
            if not math.isnan(value)
        ]
        told = f"{len(found):3} series, such as {found[0][1]:.4g} {found[0][0]}" if found else "NO DATA"
        if not found and panel.title in WITHOUT_A_GPU:
            told = f"no data, rightly: {WITHOUT_A_GPU[panel.title]}"
        elif not found:
            empty.append(f"{dashboard.title} / {panel.title}: {expr}")
        print(f"{dashboard.title} / {panel.title}: {told}")
    print(f"{len(list(queries())) - len(empty)} of {len(list(queries()))} queries are as they should be")
    for line in empty:
        print(f"NO DATA: {line}")
    return empty


def _names(prometheus: Prometheus) -> list[str]:
    return sorted({f"{labels['alertname']} {labels.get('job', '')}".strip() for labels in prometheus.firing()})


def _kill_and_recover(stack: ObservedStack, prometheus: Prometheus) -> None:
    """Kill embedding, wait for its alerts, start it, wait for their end. An assertion fails where one does not come or go."""
    embedding = stack.jobs["embedding"][0]

    def concerned() -> set[str]:
        return {
            labels["alertname"]
            for labels in prometheus.firing()
            if labels.get("job") == "embedding" or labels.get("dependency") == "embedding"
        }

    embedding.kill()
    took = prometheus.until(lambda: concerned() >= set(EXPECTED_OF_A_KILL), within_s=ALERT_WITHIN_S)
    print(f"embedding killed: {', '.join(EXPECTED_OF_A_KILL)} fire after {took:.0f} s")
    for name in EXPECTED_OF_A_KILL:
        print(f"  {name}: {prometheus.summary(name)}")
    prometheus.until(
        lambda: "DegradedAnswers" in {labels["alertname"] for labels in prometheus.firing()}, within_s=ALERT_WITHIN_S
    )
    print(f"  DegradedAnswers: {prometheus.summary('DegradedAnswers')}")
    print(f"  all that fire: {', '.join(_names(prometheus))}")
    embedding.start()
    took = prometheus.until(lambda: not concerned() & set(EXPECTED_OF_A_KILL), within_s=ALERT_WITHIN_S)
    print(f"embedding is back: {', '.join(EXPECTED_OF_A_KILL)} ended after {took:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
