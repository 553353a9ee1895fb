"""How the command line looks: lines, progress and answers, on a terminal and in a file alike."""

import json
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from services.common.wire.search import Explanation, HighlightReply, Hit, SearchReply
from tercet.supervision import Event, describe_exit

_PLAIN_WIDTH = 120
_PLAIN_LINE_EVERY_S = 3.0

# What is printed holds other people's texts: none of it is markup, an emoji name or a control character.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)


def say(text: str, style: str = "") -> None:
    """Print a line, or several; a long one is left to the terminal to break."""
    out.print(Text(text, style=style), soft_wrap=True)


def say_table(table: Table) -> None:
    """Print a table, which is never cut to the width that a file does not have."""
    out.print(table, width=None if out.is_terminal else max(_PLAIN_WIDTH, out.width))


def fail(message: str) -> None:
    """Print an error on standard error, where output that is piped on does not have it."""
    err.print(Text(f"tercet: {message}", style="red"), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    err.print(Text(message, style="yellow"), soft_wrap=True)


class ProgressLine:
    """
    Says how far something is and how fast it goes: a bar on a terminal, elsewhere a line every few seconds.

    Use it as a context manager, and `update` it with the count so far; *unit* is what is counted.
    """

    def __init__(self, label: str, *, unit: str, total: int | None = None) -> None:
        self._label = label
        self._unit = unit
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if out.is_terminal:
            count = MofNCompleteColumn() if self._total is not None else TextColumn("{task.completed}")
            columns = (TextColumn("{task.description}"), BarColumn(), count, TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=out)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done:
            self._line()

    def update(self, done: int) -> None:
        """Say that *done* have been done in all."""
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=self._rate())
        elif time.monotonic() - self._last_line >= _PLAIN_LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        of_total = f" of {self._total}" if self._total is not None else ""
        say(f"{self._label}: {self._done}{of_total} {self._unit}, {self._rate()}")

    def _rate(self) -> str:
        return f"{self._done / max(time.monotonic() - self._started, 1e-6):.0f} {self._unit}/s"


def say_reply(reply: SearchReply) -> None:
    """Print an answer: the hits with their scores by stage, what was degraded, and where the time went."""
    if not reply.hits:
        say("nothing found")
    for rank, hit in enumerate(reply.hits, start=1):
        _say_hit(rank, hit)
    reranked = f"reranked by {reply.pipeline.rerank}" if reply.pipeline.rerank else "not reranked"
    cached = "from the cache" + (", stale" if reply.cache.stale else "") if reply.cache.hit else ""
    say(", ".join(part for part in (f"{reply.pipeline.retrieval} retrieval", reranked, cached) if part), "dim")
    if reply.degraded or reply.coverage.ratio < 1:
        reasons = ", ".join(reply.degraded) or "part of the collection"
        say(f"degraded: {reasons} ({reply.coverage.ratio:.0%} of the collection searched)", "yellow")
    if reply.explain is not None:
        _say_explanation(reply.explain)
    timings = " · ".join(f"{stage.removesuffix('_ms')} {ms:.1f} ms" for stage, ms in reply.timings_ms.items())
    say(f"timings: {timings}", "dim")


def _say_hit(rank: int, hit: Hit) -> None:
    width = out.width if out.is_terminal else _PLAIN_WIDTH
    title = one_line(hit.title or hit.id)
    head = Text(f"{rank:>2}. ").append(title, style="bold").append(f"  {hit.score:.3f} {hit.score_kind}", style="cyan")
    head.truncate(max(width, 40), overflow="ellipsis")
    out.print(head, soft_wrap=True)
    stages = {name: score for name, score in hit.stages.model_dump().items() if score is not None}
    scores = " · ".join([one_line(hit.id)] + [f"{name} {score:.3f}" for name, score in stages.items()])
    say(f"    {scores}", "dim")
    if hit.highlights:
        line = Text("    ").append(_marked(hit.highlights[0]))
    else:
        line = Text(f"    {one_line(hit.text or '').removeprefix(title).strip()}")
    if line.plain.strip():
        line.truncate(max(width, 40), overflow="ellipsis")
        out.print(line, soft_wrap=True)


def _marked(highlight: HighlightReply) -> Text:
    """Return the passage on one line with its marks in bold."""
    line, at = Text(), 0
    for start, end in sorted(highlight.marks):
        line.append(_printable(highlight.text[at:start])).append(_printable(highlight.text[start:end]), style="bold")
        at = end
    return line.append(_printable(highlight.text[at:]))


def _say_explanation(explanation: Explanation) -> None:
    counts = " · ".join(f"{name} {count}" for name, count in explanation.candidates.model_dump().items())
    say(f"candidates: {counts}", "dim")
    if explanation.fusion is not None:
        weights = explanation.fusion
        say(
            f"fusion: {weights.method}, dense {weights.dense:g}, bm25 {weights.bm25:g} "
            f"(confidence {weights.bm25_confidence:g})",
            "dim",
        )
    for each in explanation.shards:
        say(f"shard {each.shard}: {one_line(json.dumps(each.plan, ensure_ascii=False))}", "dim")


def one_line(text: str) -> str:
    """Return *text* on one line without characters that a terminal would act upon."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def say_event(event: Event) -> None:
    """Print what happened to a service."""
    if event.kind == "ready":
        say(f"  {event.service} ready after {event.seconds:.1f} s", "green")
    elif event.kind == "exited":
        again = f"; starting it again in {event.restart_in_s:g} s" if event.restart_in_s is not None else ""
        say(f"  {event.service} ended ({describe_exit(event.status)}) after {event.seconds:.0f} s{again}", "yellow")


def flush() -> None:
    """Write out what is buffered."""
    sys.stdout.flush()
    sys.stderr.flush()
