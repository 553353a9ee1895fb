"""The command line of `tercet train-reranker`."""

import asyncio
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from filelock import FileLock, Timeout

from services.common.model_errors import ModelNotFound
from services.embedding.offline.console import OfflineError, fail, say, silence_libraries
from services.embedding.offline.output import check_free
from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.errors import TercetClientError
from tercet.evaluation import DatasetError
from training.data import DataError
from training.own.asking import Gathered, gather
from training.own.judgements import Judged, read_judged
from training.own.starting import default_start, open_start

if TYPE_CHECKING:
    from training.own.fine_tuning import Plan
    from training.own.verdict import Verdict

_STOPPED_STATUS = 3
_INTERRUPTED = 130

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def main() -> int:
    """Run the command; return its exit status."""
    silence_libraries()
    app(prog_name="tercet train-reranker")
    return 0


@app.command()
def train_reranker(
    collection: Annotated[str, typer.Option(help="The collection that is searched.")],
    judgements: Annotated[
        Path,
        typer.Option(
            help="Which documents answer which queries: a folder with queries.jsonl and qrels.tsv (BEIR's layout), a qrels "
            'file, or lines of {"query": …, "answers": …} (a list of ids) in a .jsonl file; each may be .gz.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="The directory to write: nothing may be in it.")],
    queries: Annotated[
        Path | None, typer.Option(help="The queries of a qrels file; else the queries.jsonl beside it.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Most minutes of training.", min=0.0)] = 20.0,
    rounds: Annotated[float, typer.Option(help="Most rounds over the questions.", min=0.0)] = 3.0,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="What to begin with: a directory that this command wrote, tercet-reranker, or an embedding model.",
            show_default="the reranker of the package",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one makes another model.")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")] = "auto",
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """
    Train the reranker on your own judgements, and measure it on a quarter of the queries, which are held back.

    Documents and wrong answers are read from the collection through a running search service. Where the model ranks the
    held-back queries worse than the one it began as, nothing is written and the exit status is 1. Ctrl-C stops it (3):
    the same command goes on from there.
    """
    with _told():
        check_free(out, force=False)
        begun = open_start(start or default_start())
        judged = read_judged(judgements, queries)
        gathered = asyncio.run(_gathered(TercetClient(resolve_url(url), api_key=api_key), collection, judged))
        # Imported here: torch takes seconds that wrong input does not need.
        from training.own.fine_tuning import Plan, recipe_for

        recipe = recipe_for(begun, gathered.collection.name, seed=seed)
        work = out.absolute().with_name(f".training-{out.name}")
        plan = Plan(begun, out.absolute(), work, minutes, recipe, rounds=rounds, device=device)
        tell(plan, _trained(plan, gathered))


async def _gathered(client: TercetClient, collection: str, judged: list[Judged]) -> Gathered:
    async with client:
        return await gather(client, collection, judged, _say)


def _trained(plan: "Plan", gathered: Gathered) -> "Verdict":
    from training.loop import Stopped
    from training.own.fine_tuning import fine_tune
    from training.ship import CannotShip

    plan.work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.work / ".lock", timeout=0):
            return fine_tune(plan, gathered, _say)
    except Timeout:
        raise OfflineError(f"{plan.work}: another run is at work there") from None
    except CannotShip as error:
        raise OfflineError(str(error)) from error
    except Stopped as stopped:
        say(str(stopped))
        raise typer.Exit(_STOPPED_STATUS) from None


def tell(plan: "Plan", verdict: "Verdict") -> None:
    """
    Print the figures, and how to serve the model.

    Raises:
        OfflineError: It is worse, and not written.
    """
    for line in verdict.lines():
        say(line)
    if verdict.is_worse:
        raise OfflineError(f"the trained model ranks worse than {plan.start.name}: {plan.out} is not written")
    say(f"written: {plan.out}", "green")
    if verdict.is_worse_than_none:
        say("without rerank these queries are ranked better still: search them with rerank: false", "yellow")
    say("serve it:")
    first_stage = shlex.quote(plan.start.first_stage)
    say(f"  RERANK_MODEL={shlex.quote(str(plan.out))} RERANK_FIRST_STAGE={first_stage} tercet up")


def _say(line: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {line}")


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the user can mend, or has asked for, into a line and an exit status."""
    try:
        yield
    except (DataError, DatasetError, ModelNotFound, OfflineError, TercetClientError) as error:
        fail(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
