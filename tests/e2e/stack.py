"""What the end-to-end tests share: a stack of three real processes on free ports, and ways to hurt it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tercet.client import TercetClient
from tercet.errors import TercetClientError
from tercet.stack import LocalStack, Ports, read_state

RECIPES = [
    ("bread", "Baking bread", "Knead flour, water, salt and yeast, let the dough rise, and bake it in a hot oven."),
    (
        "tyre",
        "Changing a tyre",
        "Loosen the nuts, lift the vehicle with a jack, swap the wheel and tighten the nuts again.",
    ),
    ("tomato", "Growing tomatoes", "Plant the seedlings in sun and water them at the root; tie the stems to a stake."),
    ("loan", "Mortgages", "A bank lends the money for a house and the buyer pays it back with interest over decades."),
    ("moon", "The tides", "The pull of the moon lifts the sea twice a day, so harbours have high and low water."),
    (
        "chess",
        "The castling rule",
        "King and rook move in one turn if neither has moved before and no square between is attacked.",
    ),
    (
        "fever",
        "Fever in children",
        "A high temperature fights infection; give fluids, and see a doctor if it lasts three days.",
    ),
    ("solar", "Solar panels", "Cells of silicon turn sunlight into current that an inverter feeds into the house."),
    ("violin", "Tuning a violin", "Turn the pegs until each string sounds a fifth from its neighbour, A first."),
    (
        "bees",
        "Why bees dance",
        "A scout shows her sisters the direction and distance of flowers by the angle of her waggle.",
    ),
]
DOCUMENTS = [
    {"id": id_, "title": title, "text": text, "metadata": {"rank": i}} for i, (id_, title, text) in enumerate(RECIPES)
]


@asynccontextmanager
async def running(data_dir: Path, **environ: str) -> AsyncIterator[tuple[LocalStack, TercetClient]]:
    """Start a stack on *data_dir*, yield it with a client, stop it."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("EMBEDDING_", "RERANK_", "SEARCH_"))
    }
    inherited.pop("REDIS_URL", None)
    stack = LocalStack(data_dir, environ={**inherited, **environ}, ports=Ports(0, 0, 0))
    async with stack, TercetClient(stack.url) as client:
        yield stack, client


def kill(stack: LocalStack, service: str) -> None:
    """End *service* with SIGKILL."""
    state = read_state(stack.data_dir)
    assert state is not None
    pid = state.pids[service]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def until(holds: Callable[[], Awaitable[bool]], *, within_s: float) -> None:
    """Wait until *holds*; an assertion fails when it does not in time. Errors of a service that is down count as no."""

    async def attempt() -> bool:
        try:
            return await holds()
        except TercetClientError:
            return False

    async with asyncio.timeout(within_s):
        while not await attempt():
            await asyncio.sleep(0.1)
