"""`tercet plan`: what a number of documents will take, before they are there."""

import re
from typing import Annotated

import typer
from rich.table import Table

from tercet.console import say, say_table
from tercet.planning import MAINTENANCE_SHARE, Plan, PlanningError, Workload
from tercet.planning import plan as make_plan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_KINDS = {"flat": "none: every vector is compared", "hnsw": "graph (HNSW, one byte a dimension)", "ivf": "lists (IVF)"}


def _number(text: str) -> int:
    found = _NUMBER.fullmatch(text.strip())
    number = round(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is no number such as 250000, 10M or 8G")
    return number


def plan(
    documents: Annotated[int, typer.Option(parser=_number, metavar="NUMBER", help="How many: 250000, 10M …")],
    dim: Annotated[int, typer.Option(help="Dimensions of a vector.", min=1)],
    text_bytes: Annotated[int, typer.Option(help="Bytes of a text, in the mean.", min=1)] = 1000,
    metadata_fields: Annotated[int, typer.Option(help="Metadata fields of a document.", min=0)] = 5,
    shards: Annotated[
        int | None, typer.Option(help="How many shards.", min=1, max=256, show_default="as many as are good")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Copies of each shard.", min=1)] = 1,
    memory_per_node: Annotated[
        int, typer.Option(parser=_number, metavar="BYTES", help="Memory of a machine: 8G …")
    ] = "8G",  # type: ignore[assignment]
) -> None:
    """
    Say what memory, disk, shards, nodes and time a number of documents will take.

    The formulas and how they were measured are in docs/sizing.md; what they say is true to about a third.
    """
    workload = Workload(documents, dim, text_bytes, metadata_fields)
    try:
        made = make_plan(workload, shards=shards, replicas=replicas, memory_per_node=memory_per_node)
    except PlanningError as error:
        raise typer.BadParameter(str(error), param_hint="--memory-per-node") from None
    _say_plan(made, memory_per_node)


def _say_plan(made: Plan, memory_per_node: int) -> None:
    work, shard = made.workload, made.shard
    each = f"{work.dim} dimensions, {work.text_bytes:,} bytes of text, {work.metadata_fields} metadata fields"
    say(f"{work.documents:,} documents: {each}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("a shard", "a node", "a replica"):
        table.add_column(heading, justify="right")
    on_node, all_of_it = made.shards_on_a_node, made.shards

    def row(name: str, value: float, *, style: str = "") -> None:
        table.add_row(name, *(_bytes(value * times) for times in (1, on_node, all_of_it)), style=style)

    table.add_row("documents", *(f"{min(shard.rows * n, work.documents):,}" for n in (1, on_node, all_of_it)))
    table.add_section()
    row("memory of the process", shard.anonymous)
    table.add_row("  while an index is built", *(_bytes(shard.building * n) for n in (1, 1, made.nodes)))
    row("page cache, at least", shard.least_cache)
    row("page cache, comfortable", shard.comfortable_cache)
    table.add_row(
        "memory, comfortable", "", _bytes(made.node_memory), _bytes(made.node_memory * made.nodes), style="bold"
    )
    table.add_section()
    row("texts", shard.texts)
    row("vectors, float32", shard.vectors)
    row("index", shard.index)
    row("words", shard.words)
    row("snapshots", shard.snapshots)
    row("disk, with room to merge", shard.disk, style="bold")
    say_table(table)
    say(f"ledger on disk: {_bytes(made.ledger)}, and as much again while it is backed up")
    say(f"shards: {made.shards} of {shard.rows:,} documents; index: {_KINDS[shard.kind]}")
    say(f"indexes built after a bulk load: {_time(made.build_s)} on {MAINTENANCE_SHARE:g} of a CPU for each node")
    if made.nodes == made.replicas == 1:
        say(f"one process does: a machine of {_bytes(memory_per_node)}, the ledger in SQLite", "green")
        return
    machines = made.nodes * made.replicas
    placed = f"{made.nodes} {'node' if made.nodes == 1 else 'nodes'} × {made.replicas} "
    placed += f"{'replica' if made.replicas == 1 else 'replicas'} = {machines} machines of {_bytes(memory_per_node)}"
    say(f"{placed}, {_bytes(made.node_disk)} of disk each; a router, and the ledger in PostgreSQL", "green")


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
