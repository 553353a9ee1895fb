"""Files, folders and standard input become documents, read one at a time."""

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tercet.ingest.chunking import DEFAULT_MAX_CHUNK_CHARS, split_document
from tercet.ingest.structure import outline
from tercet.ingest.types import DocumentDict, IngestError, MetadataValue, TextFormat

TEXT_FORMATS: dict[str, TextFormat] = {
    ".md": "markdown",
    ".txt": "plain",
    ".rst": "rst",
    ".html": "html",
    ".htm": "html",
}
SUFFIXES = (*TEXT_FORMATS, ".jsonl", ".csv")
_STDIN = "-"
_OWN_KEYS = frozenset({"id", "_id", "text", "title", "metadata", "vector"})
_CSV_FIELD_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _File:
    """A file to read, or standard input when *path* is None, and the id that its documents are named after."""

    path: Path | None
    id: str

    @property
    def label(self) -> str:
        return self.path.as_posix() if self.path else "standard input"


def read_paths(
    paths: Sequence[Path | Literal["-"]], *, max_chunk_chars: int = DEFAULT_MAX_CHUNK_CHARS
) -> Iterator[DocumentDict]:
    """
    Yield the documents in *paths* in order: files, folders (walked in sorted order) or ``-`` for NDJSON on stdin.

    Texts longer than *max_chunk_chars* come as chunks named ``<document id>#<n>``. All paths are looked up before
    the first document is yielded; a file that two of them reach is read once.

    Raises:
        IngestError: A path is missing or of an unknown type, or what it holds cannot be read as documents.
    """
    for file in _name_files(_list_files(paths)):
        for document, text_format in _read(file):
            if text_format is None:
                yield from split_document(document, max_chars=max_chunk_chars)
                continue
            structure = outline(document["text"], text_format)
            document["text"] = structure.text.strip()
            if structure.title:
                document["title"] = structure.title
            if document["text"]:
                yield from split_document(document, max_chars=max_chunk_chars, structure=structure)


def _list_files(paths: Sequence[Path | Literal["-"]]) -> Iterator[tuple[Path | None, str]]:
    """Yield each file once, with its path relative to the folder given (or its name, when given itself)."""
    seen: set[Path | None] = set()
    for path in paths:
        if str(path) == _STDIN:
            found: Iterable[tuple[Path | None, str]] = [(None, "stdin")]
        else:
            found = _list_path(Path(path))
        for file, relative in found:
            key = file.resolve() if file else None
            if key not in seen:
                seen.add(key)
                yield file, relative


def _list_path(path: Path) -> Iterator[tuple[Path, str]]:
    try:
        if path.is_dir():
            yield from ((file, file.relative_to(path).as_posix()) for file in _walk(path))
            return
        path.stat()
    except OSError as error:
        raise _unreadable(error.filename or path, error) from error
    if path.suffix.lower() not in SUFFIXES:
        raise IngestError(f"{path.as_posix()}: unknown file type {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    yield path, path.name


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        # A linked folder may lead back to where we are; a linked file is only a file.
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.suffix.lower() in SUFFIXES and entry.is_file():
            yield entry


def _name_files(files: Iterable[tuple[Path | None, str]]) -> list[_File]:
    """Give each file an id of its own: those that would share one get as many parent folders as tells them apart."""
    groups: dict[str, list[Path | None]] = defaultdict(list)
    order = list(files)
    for path, relative in order:
        groups[relative].append(path)
    named = []
    for path, relative in order:
        depth, id_ = relative.count("/") + 1, relative
        others = [other for other in groups[relative] if other is not None and other != path]
        while path and any(_tail(other, depth) == id_ for other in others):
            depth += 1
            id_ = _tail(path, depth)
        named.append(_File(path, id_))
    return named


def _tail(path: Path, depth: int) -> str:
    return "/".join(path.absolute().parts[-depth:])


def _unreadable(path: Path | str, error: OSError) -> IngestError:
    reason = "permission denied" if isinstance(error, PermissionError) else (error.strerror or str(error)).lower()
    return IngestError(f"{Path(path).as_posix()}: {reason}")


def _read(file: _File) -> Iterator[tuple[DocumentDict, TextFormat | None]]:
    """Yield a file's documents, with the format of the text where that is the whole file."""
    if file.path is None:
        yield from ((document, None) for document in _read_json_lines(file, sys.stdin.buffer))
        return
    try:
        with file.path.open("rb") as stream:
            suffix = file.path.suffix.lower()
            if suffix == ".jsonl":
                yield from ((document, None) for document in _read_json_lines(file, stream))
            elif suffix == ".csv":
                yield from ((document, None) for document in _read_csv(file, stream))
            else:
                yield _read_text(file, stream, suffix), TEXT_FORMATS[suffix]
    except OSError as error:
        raise _unreadable(file.path, error) from error


def _decode(data: bytes, file: _File, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IngestError(f"{file.label}: not valid UTF-8 at byte {offset + error.start}") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _decoded_lines(file: _File, stream: BinaryIO) -> Iterator[str]:
    offset = 0
    for line in stream:
        yield _decode(line, file, offset)
        offset += len(line)


def _read_text(file: _File, stream: BinaryIO, suffix: str) -> DocumentDict:
    data = stream.read()
    text = _decode(data, file, 0).replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise IngestError(f"{file.label}: not a text: null byte at byte {data.index(0)}")
    stem = file.id.rpartition("/")[2].rpartition(".")[0]
    metadata: dict[str, MetadataValue] = {"path": file.label, "format": _format_name(suffix)}
    return DocumentDict(id=file.id, text=text, title=stem, metadata=metadata)


def _format_name(suffix: str) -> str:
    return "text" if suffix == ".txt" else TEXT_FORMATS[suffix]


def _read_json_lines(file: _File, stream: BinaryIO) -> Iterator[DocumentDict]:
    for number, line in enumerate(_decoded_lines(file, stream), start=1):
        if not line.strip():
            continue
        place = f"{file.label}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
            raise IngestError(f"{place}: not valid JSON: {detail}") from None
        if not isinstance(entry, dict):
            raise IngestError(f"{place}: a document is a JSON object, not {_json_type(entry)}")
        yield _document(entry, default_id=f"{file.id}:{number}", place=place)


def _document(entry: dict[str, Any], *, default_id: str, place: str) -> DocumentDict:
    id_ = next((entry[key] for key in ("id", "_id") if entry.get(key) is not None), default_id)
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise IngestError(f"{place}: 'id' must be a string, not {_json_type(id_)}")
    text, title = entry.get("text"), entry.get("title")
    if not isinstance(text, str):
        found = _json_type(text) if "text" in entry else f"missing; the keys are {', '.join(entry) or 'none'}"
        raise IngestError(f"{place}: 'text' must be a string; it is {found}")
    if title is not None and not isinstance(title, str):
        raise IngestError(f"{place}: 'title' must be a string, not {_json_type(title)}")
    document = DocumentDict(id=str(id_), text=text, metadata=_metadata(entry, place))
    if title:
        document["title"] = title
    if (vector := entry.get("vector")) is not None:
        document["vector"] = _vector(vector, place)
    _check_strings(document, place)
    return document


def _check_strings(document: DocumentDict, place: str) -> None:
    title = document.get("title", "")
    if not document["text"].strip() and not title.strip():
        raise IngestError(f"{place}: 'text' is blank, and there is no title")
    for name, value in (("id", document["id"]), ("text", document["text"]), ("title", title)):
        # JSON can spell both as escapes, and no database takes them.
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise IngestError(f"{place}: {name!r} holds a null byte or half of a surrogate pair")
    if not document["id"].strip():
        raise IngestError(f"{place}: 'id' is blank")


def _metadata(entry: dict[str, Any], place: str) -> dict[str, MetadataValue]:
    """The metadata given, which must be flat; or else what else is flat among the keys of the document."""
    given = entry.get("metadata")
    if given is None:
        return {key: value for key, value in entry.items() if key not in _OWN_KEYS and _is_flat(value)}
    if not isinstance(given, dict):
        raise IngestError(f"{place}: 'metadata' must be an object, not {_json_type(given)}")
    for key, value in given.items():
        if value is not None and not _is_flat(value):
            found = _json_type(value)
            raise IngestError(f"{place}: metadata {key!r} must be a string, number, boolean or strings, not {found}")
    return {key: value for key, value in given.items() if value is not None}


def _is_flat(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _vector(value: object, place: str) -> list[float]:
    numbers = value if isinstance(value, list) else []
    if not numbers or not all(type(item) in (int, float) and math.isfinite(item) for item in numbers):
        raise IngestError(f"{place}: 'vector' must be a list of numbers")
    return [float(item) for item in numbers]


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _read_csv(file: _File, stream: BinaryIO) -> Iterator[DocumentDict]:
    # The default limit of 131,072 characters refuses long texts; the limit is the process's, so it only ever grows.
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    rows = csv.reader(_decoded_lines(file, stream), strict=True)
    try:
        columns = [column.strip() for column in next(rows, [])]
        if columns and "text" not in columns:
            raise IngestError(f"{file.label}: no column 'text'; the columns are {', '.join(columns)}")
        for cells in rows:
            if not any(cells):
                continue
            if len(cells) != len(columns):
                found = f"{len(cells)} fields for {len(columns)} columns"
                raise IngestError(f"{file.label}, line {rows.line_num}: {found}")
            yield _csv_document(dict(zip(columns, cells, strict=True)), file, rows.line_num)
    except csv.Error as error:
        raise IngestError(f"{file.label}, line {rows.line_num}: not valid CSV: {error}") from None


def _csv_document(row: dict[str, str], file: _File, line: int) -> DocumentDict:
    # CSV has no types: guessing them would make 007 the number 7.
    entry: dict[str, Any] = {key: row[key] for key in ("id", "title", "text") if row.get(key)}
    entry["text"] = row["text"]
    entry["metadata"] = {key: value for key, value in row.items() if key and key not in entry and value}
    return _document(entry, default_id=f"{file.id}:{line}", place=f"{file.label}, line {line}")
