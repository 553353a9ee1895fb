"""Files of every format become documents, and what cannot be read is named exactly."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tercet.ingest import DocumentDict, IngestError, read_paths


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*paths: Path, limit: int = 1600) -> list[DocumentDict]:
    return list(read_paths(paths, max_chunk_chars=limit))


def ids(documents: list[DocumentDict]) -> list[str]:
    return [document["id"] for document in documents]


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_folder_is_walked_in_order(tmp_path: Path) -> None:
    """Ids are paths below the folder; hidden entries and unknown suffixes are passed over."""
    for name in ("b.txt", "a/z.md", "a/c.rst", "d.HTML", ".git/e.txt", "a/.f.md", "g.png"):
        write(tmp_path / name, "Some words.")
    assert ids(read(tmp_path)) == ["a/c.rst", "a/z.md", "b.txt", "d.HTML"]


def test_a_text_file_has_title_path_and_format(tmp_path: Path) -> None:
    """The title is the first heading, else what <title> says, else the file's name."""
    write(tmp_path / "a.md", "intro\n\n## Ferns\n")
    write(tmp_path / "b.html", "<title>Moss</title><p>Green.")
    write(tmp_path / "c.txt", "\ufeffLichen.\r\nGrey.")
    documents = read(tmp_path)
    assert [document["title"] for document in documents] == ["Ferns", "Moss", "c"]
    assert documents[2]["text"] == "Lichen.\nGrey."
    path = (tmp_path / "c.txt").as_posix()
    assert documents[2]["metadata"] == {"path": path, "format": "text"}
    assert [document["metadata"]["format"] for document in documents] == ["markdown", "html", "text"]


def test_a_long_file_is_split(tmp_path: Path) -> None:
    """Chunks are numbered from 0 and their titles hold the way to their heading."""
    path = write(tmp_path / "g.md", "# Oven\n\nHot.\n\n## Bread\n\n" + "Knead it well. " * 20)
    documents = read(path, limit=120)
    assert ids(documents) == [f"g.md#{number}" for number in range(len(documents))]
    assert documents[0]["title"] == "Oven"
    assert documents[-1]["title"] == "Oven > Bread"
    assert all(len(document["text"]) <= 120 for document in documents)
    assert documents[-1]["metadata"]["path"] == path.as_posix()


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    """Files that would share an id get parent folders until they differ, in whichever order they are given."""
    one, two = write(tmp_path / "x/docs/i.md", "one"), write(tmp_path / "y/docs/i.md", "two")
    other = write(tmp_path / "x/docs/j.md", "three")
    assert ids(read(one, two, other)) == ["x/docs/i.md", "y/docs/i.md", "j.md"]
    assert ids(read(two, one)) == ["y/docs/i.md", "x/docs/i.md"]
    assert ids(read(one.parent, two.parent)) == ["x/docs/i.md", "j.md", "y/docs/i.md"]


def test_a_file_given_twice_is_read_once(tmp_path: Path) -> None:
    """A folder and a file in it may both be named."""
    file = write(tmp_path / "a.md", "one")
    assert ids(read(tmp_path, file, file)) == ["a.md"]


def test_json_lines(tmp_path: Path) -> None:
    """Ids may be _id or missing, and flat keys become metadata where none is given."""
    lines: list[dict[str, Any]] = [
        {"id": "a", "text": "one", "title": "T", "metadata": {"n": 1, "gone": None}, "vector": [1, 0.5]},
        {"_id": 7, "text": "two", "year": 1999, "tags": ["x"], "nested": {"y": 1}, "none": None},
        {"text": "three"},
    ]
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, lines[:2])) + "\n\n" + json.dumps(lines[2]))
    assert read(path) == [
        {"id": "a", "text": "one", "title": "T", "metadata": {"n": 1}, "vector": [1.0, 0.5]},
        {"id": "7", "text": "two", "metadata": {"year": 1999, "tags": ["x"]}},
        {"id": "d.jsonl:4", "text": "three", "metadata": {}},
    ]


def test_json_lines_are_split_too(tmp_path: Path) -> None:
    """A long text in a line is cut as plain text: markup in it means nothing."""
    path = write(
        tmp_path / "d.jsonl", json.dumps({"id": "a", "text": "# x\n\n" + "word " * 10, "metadata": {"k": "v"}})
    )
    documents = read(path, limit=30)
    assert ids(documents) == ["a#0", "a#1"]
    assert documents[1]["metadata"]["k"] == "v"
    assert "section" not in documents[0]["metadata"]
    assert "title" not in documents[0]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dash reads NDJSON, and a line without an id is named after its number."""
    give_stdin(monkeypatch, b'{"id":"a","text":"one"}\n{"text":"two"}\n')
    assert ids(list(read_paths(["-"]))) == ["a", "stdin:2"]


def test_csv(tmp_path: Path) -> None:
    """Columns other than id, title and text are metadata, as strings; empty cells are left out."""
    path = write(tmp_path / "d.csv", '\ufeffid,text,code,note\nx,"a, b\nc",007,\n\n,two,,n\n')
    assert read(path) == [
        {"id": "x", "text": "a, b\nc", "metadata": {"code": "007"}},
        {"id": "d.csv:5", "text": "two", "metadata": {"note": "n"}},
    ]


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    """The csv module's own limit of 131,072 characters does not apply."""
    path = write(tmp_path / "d.csv", "text\n" + "w" * 200_000)
    assert sum(len(document["text"]) for document in read(path)) == 200_000


@pytest.mark.parametrize("name", ["a.md", "a.txt", "a.rst", "a.html", "a.jsonl", "a.csv"])
def test_an_empty_file_yields_nothing(tmp_path: Path, name: str) -> None:
    """Nothing to read is no error."""
    assert read(write(tmp_path / name, "")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", "a.txt: not valid UTF-8 at byte 3"),
        ("a.jsonl", b'{"text":"ok"}\n{"text":"\xff"}', "a.jsonl: not valid UTF-8 at byte 23"),
        ("a.txt", "a\0b", "null byte at byte 1"),
        ("a.pdf", "x", "unknown file type '.pdf'; known are .md,"),
        ("a.jsonl", '{"text":"ok"}\n{"text":', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]", "line 1: a document is a JSON object, not a list"),
        ("a.jsonl", '{"id":"a","body":"x"}', "line 1: 'text' must be a string; it is missing; the keys are id, body"),
        ("a.jsonl", '{"text":5}', "'text' must be a string; it is a number"),
        ("a.jsonl", '{"text":" "}', "line 1: 'text' is blank"),
        ("a.jsonl", '{"text":"\\ud800"}', "'text' holds"),
        ("a.jsonl", '{"text":"x","id":true}', "'id' must be a string, not a boolean"),
        ("a.jsonl", '{"text":"x","title":3}', "'title' must be a string"),
        ("a.jsonl", '{"text":"x","metadata":{"a":{"b":1}}}', "metadata 'a' must be a string"),
        ("a.jsonl", '{"text":"x","metadata":{"a":NaN}}', "metadata 'a' must be a string"),
        ("a.jsonl", '{"text":"x","vector":["a"]}', "'vector' must be a list of numbers"),
        ("a.csv", "id,body\n1,x\n", "a.csv: no column 'text'; the columns are id, body"),
        ("a.csv", "text,n\nx,1,2\n", "a.csv, line 2: 3 fields for 2 columns"),
        ("a.csv", 'text\n"x', "not valid CSV"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """The error says which file, where in it, and what is wrong."""
    path = write(tmp_path / name, content)
    with pytest.raises(IngestError) as caught:
        read(path)
    assert message in caught.value.message
    assert name in caught.value.message


def test_a_missing_path_is_found_before_anything_is_read(tmp_path: Path) -> None:
    """Paths are looked up first, so that a typing error does not leave half of the work done."""
    documents = read_paths([write(tmp_path / "a.md", "x"), tmp_path / "b.md"])
    with pytest.raises(IngestError, match=r"b\.md: no such file or directory"):
        next(documents)


def test_permission_denied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be opened is the user's to fix."""
    path = write(tmp_path / "a.md", "x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(IngestError, match=r"a\.md: permission denied"):
        read(path)


def test_a_folder_linked_into_itself_ends(tmp_path: Path) -> None:
    """Linked folders are not followed; linked files are read once."""
    file = write(tmp_path / "a.md", "x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.md").symlink_to(file)
    (tmp_path / "c.md").symlink_to(tmp_path / "gone")
    assert ids(read(tmp_path)) == ["a.md"]
