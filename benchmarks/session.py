"""What every measuring program shares: its command line, its rows and failures, and its section of RESULTS.md."""

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

from benchmarks import machine, report
from benchmarks.load import LoadFailed
from benchmarks.report import Row
from benchmarks.servers import ServerFailed


class Session:
    """One run: keeps what was measured, and goes on with the next row when one fails."""

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        raise NotImplementedError

    def keep(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure one row, print it and keep it; what fails is noted."""
        print(f"Measuring {name} …", flush=True)
        try:
            row = measure()
        except (LoadFailed, ServerFailed, OSError, HTTPException) as failure:
            self.fail(name, failure)
        else:
            self.rows.append(row)
            print(report.markdown(row), flush=True)

    def fail(self, name: str, failure: Exception) -> None:
        """Note that a row could not be measured."""
        self.failures.append(f"{name} was not measured: {failure}")
        print(self.failures[-1], flush=True)


def arguments(program: str, description: str, choices: Sequence[str], given: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument("--quick", action="store_true", help="a few minutes, to see that all works; not for figures")
    parser.add_argument("--only", action="append", choices=choices, help="measure this row; may be given again")
    parser.add_argument("--out", type=Path, help="where RESULTS.md, the plot and the raw figures go")
    parser.add_argument("--note", default="", help="what changed since the last figures, for RESULTS.md")
    options = parser.parse_args(given)
    options.only = options.only or list(choices)
    if options.out is None:  # Quick figures do not belong among the real ones.
        options.out = machine.ROOT / ("build/benchmarks" if options.quick else "benchmarks")
    return options


def measure(
    program: str, options: argparse.Namespace, given: Sequence[str], make_session: Callable[[Path], Session]
) -> int:
    """
    Run the session that *make_session* makes for a scratch directory, and add a section to RESULTS.md.

    Returns 1 when a row could not be measured.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the servers are ended too.
    about = machine.describe()
    print("\n".join([machine.commit(), *about]), flush=True)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as scratch:
        session = make_session(Path(scratch))
        session.run()
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    options.out.mkdir(parents=True, exist_ok=True)
    plot_name = f"plots/{program}-{stamp}.png"
    drawn = report.plot(session.rows, options.out / plot_name)
    text = report.section(
        session.rows,
        commit=machine.commit(),
        note=options.note,
        machine=[*about, *session.facts, *session.failures],
        command=shlex.join(["python", "-m", f"benchmarks.{program}", *_without_note(given)]),
        plot=plot_name if drawn else None,
    )
    report.append(options.out / "RESULTS.md", text)
    print(f"Written to {options.out / 'RESULTS.md'}")
    return 1 if session.failures else 0


def _without_note(given: Sequence[str]) -> list[str]:
    return [word for before, word in zip(["", *given], given, strict=False) if "--note" not in (before, word)]
