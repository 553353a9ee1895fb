"""
The demo corpus: the documentation of the Python that runs, from its docstrings and language topics.

Reading docstrings takes importing every public module, so a child process does it: ``python -m tercet.demo.corpus``
prints the documents as NDJSON.
"""

import faulthandler
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tercet.demo.docstrings import Collector, Entry
from tercet.ingest.chunking import DEFAULT_MAX_CHUNK_CHARS, split_document
from tercet.ingest.structure import outline
from tercet.ingest.types import DocumentDict, MetadataValue, TextFormat

MOST_USED = (
    "builtins asyncio pathlib json re collections itertools functools datetime os os.path subprocess shutil logging "
    "argparse typing dataclasses contextlib time random math string csv sqlite3 threading concurrent.futures queue "
    "urllib.request urllib.parse tempfile glob hashlib uuid enum copy heapq bisect statistics decimal textwrap io "
    "pickle unittest unittest.mock socket http.client collections.abc operator multiprocessing sys inspect traceback"
)
_SKIPPED = frozenset(
    {
        # Open a browser, print, or need a display.
        *("antigravity", "this", "tkinter", "turtle", "turtledemo", "idlelib"),
        # Patched by packaging tools when they are imported.
        *("distutils", "ensurepip"),
        # Tests, tables and tools of CPython's own, and other systems' halves of os and os.path.
        *("test", "lib2to3", "pydoc_data", "xxlimited", "xxlimited_35", "xxsubtype", "encodings", "ctypes.macholib"),
        *("ctypes.test", "sqlite3.test", "unittest.test", "concurrent.futures.interpreter", "asyncio.tools"),
        *("posix", "posixpath", "ntpath", "nt", "nturl2path", "genericpath", "sre_compile", "sre_constants"),
        *("sre_parse", "msilib", "msvcrt", "winreg", "winsound", "pyexpat"),
    }
)
_TELLING_CHARS = 60
_CHILD_TIMEOUT_S = 120
_CHILD = "import sys; sys.path.append(sys.argv.pop(1)); from tercet.demo.corpus import main; main()"
# What an interpreter may need to start, and nothing that could find its way into a docstring.
_CHILD_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_ERROR_TAIL_CHARS = 2000


def demo_documents() -> Iterator[DocumentDict]:
    """
    Yield the demo corpus in an order that is the same each time, the most used modules first.

    The child process that reads it ends with this generator, whether or not it was read to its end.

    Raises:
        RuntimeError: The child failed; the message holds the end of what it wrote.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryFile() as errors:
        # -I: neither the environment nor the working folder may put other modules in place of the library's.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, package_root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={name: os.environ[name] for name in _CHILD_ENVIRONMENT if name in os.environ},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code != 0:
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-_ERROR_TAIL_CHARS:]
            raise RuntimeError(f"reading the demo corpus failed (exit status {code}): {tail}")


def main() -> None:
    """Print the corpus to standard output; what the imports print goes nowhere."""
    # Against an import that never ends: the process exits with a traceback on standard error.
    faulthandler.dump_traceback_later(_CHILD_TIMEOUT_S, exit=True)
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n") as stream:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.close(silence)
        _write(stream)
    # Not sys.exit: among so many modules some leave threads or exit handlers behind.
    os._exit(0)


def _write(stream: TextIO) -> None:
    for entry in entries():
        for document in _documents(entry):
            stream.write(json.dumps(document) + "\n")


def _documents(entry: Entry) -> Iterator[DocumentDict]:
    metadata: dict[str, MetadataValue] = {"module": entry.module, "kind": entry.kind, "name": entry.name}
    if entry.signature:
        metadata["signature"] = entry.signature
    document = DocumentDict(id=entry.id, text=entry.text, title=entry.title, metadata=metadata)
    text_format: TextFormat = "rst" if entry.kind == "topic" else "plain"
    yield from split_document(document, max_chars=DEFAULT_MAX_CHUNK_CHARS, format=text_format)


def entries() -> Iterator[Entry]:
    """Import the library's public modules in this process and yield what is documented, each object once."""
    warnings.simplefilter("ignore")
    collector = Collector()
    first = MOST_USED.split()
    for name in first:
        yield from _module_entries(collector, name)
    yield from _topics()
    for name in _module_names():
        if name not in first:
            yield from _module_entries(collector, name)


def _module_entries(collector: Collector, name: str) -> Iterator[Entry]:
    module = _import(name)
    return iter(()) if module is None else collector.module(name, module)


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    # A C library or another operating system may be missing, and some modules exit when they are.
    except (Exception, SystemExit):
        return None


def _module_names() -> Iterator[str]:
    """Yield the names of the library's public modules in order, each package before what is in it."""
    pending = sorted((name for name in sys.stdlib_module_names if _is_public(name)), reverse=True)
    while pending:
        name = pending.pop()
        yield name
        path = getattr(_import(name), "__path__", None)
        found = sorted((f"{name}.{module.name}" for module in pkgutil.iter_modules(path)), reverse=True) if path else ()
        pending.extend(inner for inner in found if _is_public(inner))


def _is_public(name: str) -> bool:
    last = name.rpartition(".")[2]
    return not last.startswith("_") and last not in ("test", "tests") and name not in _SKIPPED


def _topics() -> Iterator[Entry]:
    """Yield the language reference that ``help("lambda")`` and its like show."""
    topics = getattr(_import("pydoc_data.topics"), "topics", {})
    for name, text in sorted(_without_collections(topics).items()):
        title = outline(text, "rst").title or name
        yield Entry(f"topic:{name}", "topic", "pydoc_data.topics", name, title, text)


def _without_collections(topics: dict[str, str]) -> dict[str, str]:
    """Leave out the topics that are mostly made of shorter ones (`compound` holds `if`, `while`, `with`, …)."""
    kept: dict[str, str] = {}
    told: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda topic: (len(topic[1]), topic[0])):
        text = inspect.cleandoc(text)
        paragraphs = {" ".join(part.split()) for part in text.split("\n\n") if len(part) > _TELLING_CHARS}
        if paragraphs and 2 * len(paragraphs & told) > len(paragraphs):
            continue
        kept[name] = text
        told |= paragraphs
    return kept


if __name__ == "__main__":
    main()
