"""
`python -m training --data DIR --out DIR`: makes the cross-encoder that ships, on two cores in at most 90 minutes.

It may be stopped at any time, with SIGTERM, SIGINT or SIGKILL: the same command goes on where it was.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from training.data import TRAINED, DataError
from training.loop import Budget, Stopped
from training.recipe import EMBEDDING_MODEL, Recipe, Share
from training.run import RESULTS_FILE, Plan, install, run
from training.ship import CannotShip

ROOT = Path(__file__).parents[1]
_STOPPED_STATUS = 3


def main() -> int:
    """Return 0 when the model is made, 3 when it was stopped and can go on, 1 when it cannot be made."""
    options = _parser().parse_args()
    plan = _plan(options)
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / ".lock", timeout=0)
    try:
        with lock:
            outcome = run(plan, _Said(plan.out / "log.txt"))
            if options.install:
                place = ROOT / "tercet" / "models" / "reranker"
                install(plan, outcome, model=place, report=ROOT / "training" / RESULTS_FILE)
                print(f"installed in {place}")
    except Stopped as stopped:
        print(stopped)
        return _STOPPED_STATUS
    except Timeout:
        print(f"{plan.out}: another run is at work there", file=sys.stderr)
        return 1
    except (DataError, CannotShip) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Said:
    """Prints a line with the time, and adds it to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the sets")
    parser.add_argument("--out", type=Path, default=Path("build/reranker"), help="all that is made, also on the way")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--minutes", type=float, default=60.0, help="of training; pauses do not count (default 60)")
    how_long.add_argument("--steps", type=_count, help="of training: the same number makes the same model")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--leave-out", action="append", default=[], choices=TRAINED, metavar="SET",
        help=f"do not train on it ({', '.join(TRAINED)}); may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--judged", type=_count, metavar="N", help="evaluate on the first N questions of each set; otherwise on all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a minute's run over a little of each set, to see that all works"
    )
    parser.add_argument(
        "--install", action="store_true", help="put the model into tercet/models and the report into training/"
    )
    return parser


def _count(given: str) -> int:
    if not given.isascii() or not given.isdigit() or not int(given):
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number from 1")
    return int(given)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


def _plan(options: argparse.Namespace) -> Plan:
    out, left_out = options.out, tuple(sorted(set(options.leave_out)))
    recipe = replace(Recipe(), seed=options.seed)
    budget = Budget(steps=options.steps) if options.steps else Budget(seconds=60 * options.minutes)
    command = f"python -m training --data {options.data} --seed {options.seed}"
    command += "".join(f" --leave-out {name}" for name in left_out)
    command += f" --judged {options.judged}" if options.judged else ""
    prepared = out / "prepared"
    if left_out:
        out = out / f"without-{'-'.join(left_out)}"
    limit, most_judged = None, options.judged
    if options.quick:
        out, limit, most_judged, command = out / "quick", 200, most_judged or 5, f"{command} --quick"
        recipe = replace(recipe, real={name: Share(50, 1) for name in TRAINED})
        budget = Budget(steps=options.steps or 20)
    return Plan(
        data=options.data,
        out=out,
        prepared=prepared,
        recipe=recipe,
        budget=budget,
        embedding_model=EMBEDDING_MODEL,
        command=command,
        device=options.device,
        left_out=left_out,
        limit=limit,
        most_judged=most_judged,
    )
