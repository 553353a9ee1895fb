"""The command line: what it lists, and that errors a user can mend are one line and exit status 1."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.common.auth import open_key_ring
from services.common.settings import ServiceSettings
from services.common.wire.search import SearchReply
from tercet.cli import app
from tercet.commands import resolve_url
from tercet.commands.evaluate import collection_name
from tercet.console import ProgressLine, one_line, say_reply
from tercet.evaluation import load_beir

runner = CliRunner()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A URL at which nothing listens, in a folder where no stack runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TERCET_URL", raising=False)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_help_lists_the_commands() -> None:
    """Each command is there with a line about it."""
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("up", "index", "search", "status", "eval", "demo-eval", "keys"):
        assert f" {command} " in result.output
        assert runner.invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [["search", "a question"], ["status"], ["demo-eval"], ["index", "notes.txt", "--collection", "c"]]
)
def test_an_unreachable_service_is_one_line(nowhere: str, arguments: list[str]) -> None:
    """It says where and what to do, on standard error."""
    Path("notes.txt").write_text("some notes")
    result = runner.invoke(app, [*arguments, "--url", nowhere])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert nowhere in result.stderr
    assert "tercet up" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nope.txt", "--collection", "c"], "nope.txt: no such file"),
        (["eval", "nope"], "nope: no such folder"),
        (["search", "q", "--filter", "{"], "not valid JSON"),
        (["search", "q", "--filter", "[1]"], "must be a JSON object"),
        (["search", "q", "--mode", "psychic"], "psychic"),
    ],
)
def test_bad_arguments_are_told(nowhere: str, arguments: list[str], message: str) -> None:
    """Before anything is sent."""
    result = runner.invoke(app, [*arguments, "--url", nowhere])
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_taken_port_is_one_line(nowhere: str) -> None:
    """`tercet up` says which flag chooses another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = runner.invoke(app, ["up", "--embedding-port", port, "--search-port", "0", "--rerank-port", "0"])
    assert result.exit_code == 1
    assert port in result.stderr
    assert "--embedding-port" in result.stderr


def test_the_address_meant(nowhere: str) -> None:
    """The one given, or the usual one where no stack runs."""
    assert resolve_url(nowhere) == nowhere
    assert resolve_url(None) == "http://127.0.0.1:8000"


def test_an_evaluated_collection_is_named_by_folder_content_and_model(tmp_path: Path) -> None:
    """So that a second run finds it, and another model does not; the name is one that a collection may have."""
    folder = tmp_path / "a folder, mine"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "t"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "t"}\n')
    (folder / "qrels.tsv").write_text("q\td\t1\n")
    first = collection_name(load_beir(folder), "model")
    assert first == collection_name(load_beir(folder), "model")
    assert first != collection_name(load_beir(folder), "other")
    assert first.startswith("eval-a-folder-mine-")


def test_an_answer_is_printed_without_markup_or_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A document cannot colour the terminal, and brackets in titles are kept; what was degraded is said."""
    reply = SearchReply.model_validate(
        {
            "collection": "c",
            "hits": [
                {
                    "id": "a",
                    "score": 0.5,
                    "score_kind": "blended",
                    "title": "list[int] :smile:",
                    "text": "list[int] :smile:\n\n\x1b[31mred\x1b[0m  and\nmore " + "x" * 500,
                    "stages": {"dense": 0.25, "rerank": 0.75},
                }
            ],
            "coverage": {"ratio": 0.5, "shards": {"total": 2, "ok": 1}},
            "degraded": ["rerank_late"],
            "pipeline": {"retrieval": "hybrid", "rerank": "m"},
            "cache": {"hit": False},
            "as_of": 1,
            "timings_ms": {"rerank": 12.34, "total": 20},
        }
    )
    say_reply(reply)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert " 1. list[int] :smile:  0.500 blended" in printed
    assert "dense 0.250 · rerank 0.750" in printed
    assert "degraded: rerank_late (50% of the collection searched)" in printed
    assert "rerank 12.3 ms · total 20.0 ms" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """No bar and no control characters; the last line has the whole count."""
    with ProgressLine("indexing", unit="texts", total=3) as progress:
        progress.update(1)
        progress.update(3)
    printed = capsys.readouterr().out
    assert printed.startswith("indexing: 3 of 3 texts, ")
    assert printed.count("\n") == 1
    assert one_line("a\n\tb\x07c") == "a b c"


def test_a_new_key_fits_its_entry(tmp_path: Path) -> None:
    """What is printed for the file of keys opens with the key that is printed, and for the scopes asked for."""
    result = runner.invoke(app, ["keys", "new", "web-shop", "--scopes", "search, embed"])
    assert result.exit_code == 0
    key, entry = (line for line in result.output.splitlines() if " key" not in line and not line.startswith("Its"))
    assert len(key) >= 43
    path = tmp_path / "keys.json"
    path.write_text(f"[{entry}]")
    ring = open_key_ring(ServiceSettings(api_keys_file=path))
    assert ring is not None
    found = ring.find(key.encode())
    assert found is not None
    assert (found.name, found.scopes) == ("web-shop", {"search", "embed"})
    assert key not in entry
    assert key not in runner.invoke(app, ["keys", "new", "web-shop"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["two words"], "NAME"), (["a", "--scopes", "fly"], "--scopes"), (["a", "--scopes", ""], "--scopes")],
)
def test_a_bad_name_or_scope_is_told(arguments: list[str], message: str) -> None:
    """Before a key is made."""
    result = runner.invoke(app, ["keys", "new", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
