"""`tercet snapshot` and `tercet restore` on the command line: what they print, and their exit statuses."""

import asyncio
import re
from pathlib import Path

from typer.testing import CliRunner

from services.search.ledger.sqlite import SqliteLedger
from services.search.offline.__main__ import app
from services.search.offline.layout import LEDGER
from tercet.cli import app as tercet


def make_data(directory: Path) -> Path:
    """Make a data directory with an empty ledger."""

    async def make() -> None:
        await (await SqliteLedger.open(directory / LEDGER)).aclose()

    asyncio.run(make())
    return directory


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_what_was_done_is_printed(tmp_path: Path) -> None:
    """Where it is, and what is in it; the next command with --keep says what it removed."""
    data = make_data(tmp_path / "data")
    status, out, _ = run("snapshot", "--to", tmp_path / "b", "--data-dir", data)
    assert status == 0
    assert re.search(rf"backed up: {tmp_path}/b/\d{{8}}T\d{{6}}\.\d{{3}}Z\n", out)
    assert "  ledger       0 documents in 0 collections\n  shards       0 snapshots of 0 documents\n" in out
    assert "  removed      1 older\n" in run("snapshot", "--to", tmp_path / "b", "--data-dir", data, "--keep", 1)[1]
    status, out, _ = run("restore", tmp_path / "b", "--data-dir", tmp_path / "again")
    assert status == 0
    assert f"in {tmp_path}/again\n" in out


def test_errors_are_one_line(tmp_path: Path) -> None:
    """On standard error, with exit status 1."""
    data = make_data(tmp_path / "data")
    for arguments in (
        ("snapshot", "--to", "nope://x", "--data-dir", data),
        ("snapshot", "--to", tmp_path, "--data-dir", tmp_path / "nowhere"),
        ("snapshot", "--to", tmp_path, "--data-dir", data, "--no-shards", "--no-ledger"),
        ("restore", tmp_path / "nothing", "--data-dir", tmp_path / "again"),
        ("restore", tmp_path / "nothing", "--data-dir", data),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("tercet: ")
        assert err.count("\n") == 1


def test_tercet_lists_the_commands() -> None:
    """They are beside the others."""
    listed = CliRunner().invoke(tercet, ["--help"]).output
    for command in ("snapshot", "restore", "plan"):
        assert f" {command} " in listed
