"""Reading what a projection is fitted on and judged by: texts, queries and judgements, in BEIR's layout or as lines."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from services.embedding.offline.console import OfflineError


@dataclass(frozen=True, slots=True)
class Document:
    """A text by its id, which is its line's number where the file gives none."""

    id: str
    text: str


def read_documents(file: Path) -> list[Document]:
    """
    Read a text file with one text a line, or a `.jsonl` file of objects with `text`, and maybe `title` and `_id`.

    A name that ends in `.gz` is unpacked. A title goes before its text as search puts it there, on a line of its own.
    Lines without text are left out; order is kept.

    Raises:
        OfflineError: There is no such file, or a line is not what it should be.
    """
    is_json = ".jsonl" in file.suffixes
    documents = []
    for number, line in _lines(file):
        if is_json:
            entry = _entry(file, number, line)
            text, title = _string(file, number, entry, "text"), _string(file, number, entry, "title")
            if title and not text.startswith(title):
                text = f"{title}\n{text}" if text else title
            document = Document(str(entry.get("_id", entry.get("id", number))), text)
        else:
            document = Document(str(number), line.strip())
        if document.text.strip():
            documents.append(document)
    return documents


def read_judgements(file: Path) -> dict[str, dict[str, int]]:
    """
    Read `query<TAB>document<TAB>grade` lines, with or without a header, or TREC's four columns: grades by query.

    Raises:
        OfflineError: There is no such file, or a line is not what it should be.
    """
    grades: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        fields = line.split("\t") if "\t" in line else line.split()
        try:
            if len(fields) not in (3, 4):
                raise ValueError
            grades.setdefault(fields[0], {})[fields[-2]] = int(fields[-1])
        except ValueError:
            if number > 1:
                raise OfflineError(f"{file}, line {number}: not query, document and grade") from None
    return grades


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise OfflineError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _open(file: Path) -> TextIO:
    # newline: a separator inside a text is no end of line.
    if file.suffix == ".gz":
        return cast(TextIO, gzip.open(file, "rt", encoding="utf-8", newline="\n"))
    return file.open(encoding="utf-8", newline="\n")


def _entry(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise OfflineError(f"{file}, line {number}: not valid JSON: {error}") from None
    if not isinstance(entry, dict):
        raise OfflineError(f"{file}, line {number}: not a JSON object")
    return entry


def _string(file: Path, number: int, entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if value is None and (key == "title" or "title" in entry):
        return ""
    if not isinstance(value, str):
        raise OfflineError(f"{file}, line {number}: {key!r} must be a string")
    # Halves of surrogate pairs, which JSON can write and no tokenizer takes.
    return value.encode("utf-8", "replace").decode()
