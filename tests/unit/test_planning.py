"""`tercet plan`: the formulas hold on a real ledger and a real shard, and what is printed adds up."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.sizing import measure
from services.search.settings import SearchSettings
from tercet import planning
from tercet.cli import app
from tercet.planning import PlanningError, Workload, ledger_bytes, open_shard_bytes, plan, size_of_shard

TEN_MILLION = Workload(10_000_000, 384)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "shape", [{"dim": 96, "text_bytes": 600, "fields": 4}, {"dim": 384, "text_bytes": 200, "fields": 0}]
)
def test_formulas_hold_on_a_real_shard(tmp_path: Path, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the disk, and the memory of an open shard, is within 30 % of what the formula says."""
    count = 6000
    found = asyncio.run(measure(tmp_path, count, **shape))
    monkeypatch.setattr(planning, "HNSW_ROWS", 0)
    work = Workload(count, shape["dim"], shape["text_bytes"], shape["fields"])
    said = size_of_shard(work, 1)
    assert found.ledger_bytes == pytest.approx(ledger_bytes(work), rel=0.3)
    assert found.store_bytes == pytest.approx(said.texts, rel=0.3)
    assert found.vector_bytes == pytest.approx(said.vectors, rel=0.01)
    assert found.graph_bytes == pytest.approx(said.index, rel=0.3)
    assert found.lexical_bytes == pytest.approx(said.words, rel=0.3)
    assert found.snapshot_bytes == pytest.approx(said.snapshots / planning.KEPT_SNAPSHOTS, rel=0.3)
    newest = min(count, planning.TAIL_ROWS) * 4 * work.dim  # A shard at rest has none in the tail.
    assert found.anonymous_bytes == pytest.approx(
        open_shard_bytes(count, work.dim, work.metadata_fields) - newest, rel=0.3
    )


def test_defaults_are_the_services() -> None:
    """The thresholds of the plan are those that a service has when nobody sets any."""
    settings = SearchSettings()
    assert (settings.tail_rows, settings.hnsw_rows) == (planning.TAIL_ROWS, planning.HNSW_ROWS)
    assert settings.ivf_rows == planning.IVF_ROWS
    assert settings.maintenance_share == planning.MAINTENANCE_SHARE


def test_more_of_anything_takes_more() -> None:
    """Every size grows with documents, dimensions, text and fields."""

    def sizes(work: Workload) -> tuple[float, ...]:
        shard = size_of_shard(work, 4)
        return ledger_bytes(work), shard.disk, shard.anonymous, shard.comfortable_cache, shard.build_s

    less = sizes(TEN_MILLION)
    for name, value in {"documents": 20_000_000, "dim": 768, "text_bytes": 3000}.items():
        assert all(big > small for big, small in zip(sizes(replace(TEN_MILLION, **{name: value})), less, strict=True))
    assert sizes(replace(TEN_MILLION, metadata_fields=50))[:3] > less[:3]


def test_nodes_hold_their_shards() -> None:
    """The shards are divided so that the fullest node has room; fewer nodes would not do."""
    made = plan(TEN_MILLION, memory_per_node=8e9)
    assert made.shard.kind == "hnsw"
    assert made.node_memory <= 8e9
    assert replace(made, nodes=made.nodes - 1).node_memory > 8e9 * planning.NODE_SHARE
    assert plan(TEN_MILLION, memory_per_node=64e9).nodes == 1
    assert plan(Workload(1000, 384)).shards == planning.MIN_SHARDS
    assert plan(TEN_MILLION, memory_per_node=2e9).shards > made.shards


def test_kinds_follow_the_rows_of_a_shard() -> None:
    """Few rows are compared one by one, many have a graph, very many lists."""
    kinds = [size_of_shard(Workload(n, 64), 1).kind for n in (1000, 100_000, 3_000_000)]
    assert kinds == ["flat", "hnsw", "ivf"]
    assert size_of_shard(Workload(1000, 64), 1).index == 0


def test_a_shard_that_fits_no_node_is_refused() -> None:
    """It says how much memory one would need; the command names the option."""
    with pytest.raises(PlanningError, match=r"one of 1 shards needs a node of \d+\.\d GB"):
        plan(TEN_MILLION, shards=1, memory_per_node=4e9)
    result = CliRunner().invoke(
        app, ["plan", "--documents", "10M", "--dim", "384", "--shards", "1", "--memory-per-node", "4G"]
    )
    assert result.exit_code == 2
    assert "--memory-per-node" in result.stderr


def test_the_plan_is_printed() -> None:
    """Numbers are read with their units; the table has memory, disk, shards, index and machines."""
    result = CliRunner().invoke(app, ["plan", "--documents", "10M", "--dim", "384", "--replicas", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("10,000,000 documents: 384 dimensions, 1,000 bytes of text, 5 metadata fields\n")
    for words in (
        "page cache, comfortable",
        "disk, with room to merge",
        "ledger on disk",
        "graph (HNSW",
        "× 2 replicas =",
    ):
        assert words in result.output
    small = CliRunner().invoke(app, ["plan", "--documents", "20000", "--dim", "384"]).output
    assert "one process does: a machine of 8.0 GB, the ledger in SQLite" in small
    assert CliRunner().invoke(app, ["plan", "--documents", "many", "--dim", "384"]).exit_code == 2
