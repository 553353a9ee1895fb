"""The demo corpus is complete and clean, and its questions can be answered from it."""

import json
import subprocess
import sys
import types
from collections import Counter

import pytest

from tercet.demo.corpus import demo_documents
from tercet.demo.docstrings import Collector
from tercet.demo.questions import load_questions, reciprocal_rank
from tercet.ingest.types import DocumentDict

# Answers that older versions of Python do not have.
# What later versions have or document.
SINCE = {"pathlib.Path.walk": (3, 12), "asyncio.Timeout": (3, 11, 7)}


@pytest.fixture(scope="module")
def corpus() -> list[DocumentDict]:
    return list(demo_documents())


def names(corpus: list[DocumentDict]) -> set[str]:
    return {document["id"].partition("#")[0] for document in corpus}


def test_the_corpus_has_thousands_of_distinct_documents(corpus: list[DocumentDict]) -> None:
    """Ids are distinct, texts are short enough to embed, titles and signatures are bounded."""
    assert 4000 <= len(corpus) <= 8000
    assert len({document["id"] for document in corpus}) == len(corpus)
    assert all(0 < len(document["text"]) <= 1600 for document in corpus)
    assert all(len(document["title"]) <= 200 for document in corpus if not document["id"].startswith("topic:"))
    assert all(len(str(document["metadata"].get("signature", ""))) <= 300 for document in corpus)


def test_objects_have_their_public_names(corpus: list[DocumentDict]) -> None:
    """A re-exported object appears once, under the name that its users write."""
    found = names(corpus)
    assert {"asyncio.wait_for", "str.join", "len", "os.path.join", "random.choice", "topic:lambda"} <= found
    assert {"math.fsum", "json", "pathlib.Path.read_text", "pathlib.Path.rglob", "itertools.chain"} <= found
    assert not {"asyncio.tasks.wait_for", "builtins.len", "posixpath.join", "random.Random.choice"} & found


def test_documents_say_what_they_are(corpus: list[DocumentDict]) -> None:
    """Metadata hold module, kind, name and signature; the text begins with the signature."""
    document = next(document for document in corpus if document["id"] == "textwrap.dedent")
    assert document["title"] == "textwrap.dedent(text)"
    assert document["text"].startswith("textwrap.dedent(text)\n\n")
    assert document["metadata"] == {"module": "textwrap", "kind": "function", "name": "dedent", "signature": "(text)"}
    kinds = Counter(document["metadata"]["kind"] for document in corpus)
    assert set(kinds) == {"module", "class", "function", "method", "attribute", "topic"}


def test_the_most_used_modules_come_first(corpus: list[DocumentDict]) -> None:
    """The order is that of use, so that a part of the corpus is a useful corpus."""
    modules = list(dict.fromkeys(document["metadata"]["module"] for document in corpus))
    assert modules[:4] == ["builtins", "asyncio", "pathlib", "json"]


def test_generic_docstrings_are_left_out(corpus: list[DocumentDict]) -> None:
    """What every object says of itself helps nobody."""
    found = names(corpus)
    assert not {"int.__add__", "str.__len__", "object.__init__"} & found
    assert not [name for name in found if name.endswith(("__dict__", "__weakref__"))]
    assert not [document["id"] for document in corpus if "Return self<value" in document["text"]]


def test_nothing_of_the_process_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some defaults are os.environ itself: signatures show neither it nor addresses nor paths."""
    monkeypatch.setenv("TERCET_TEST_CANARY", "canary-value")
    shown = "".join(json.dumps(document) for document in demo_documents())
    assert "canary" not in shown
    assert " object at 0x" not in shown.replace("at 0x...", "").replace("at 0x1", "")
    assert sys.prefix not in shown


def test_a_default_that_holds_state_is_not_shown() -> None:
    """Plain defaults are shown as written, a class by its name, anything else as an ellipsis."""
    module = types.ModuleType("sample", "A module that is long enough to be documented.")

    def act(a: object = 1, b: object = {"secret": "x"}, c: object = dict, d: object = "/home/somebody") -> None:
        """Do something that is worth a sentence."""

    act.__module__ = "sample"
    module.act = act  # type: ignore[attr-defined]
    entry = list(Collector().module("sample", module))[1]
    assert entry.signature == "(a: object = 1, b: object = ..., c: object = dict, d: object = ...) -> None"


def test_the_child_runs_by_itself() -> None:
    """The module prints nothing but NDJSON, whatever the imports print, and nothing on standard error."""
    done = subprocess.run([sys.executable, "-m", "tercet.demo.corpus"], capture_output=True, check=True, timeout=60)
    assert done.stderr == b""
    assert json.loads(done.stdout.splitlines()[0])["metadata"]["module"] == "builtins"


def test_reading_may_stop_early() -> None:
    """A reader that has seen enough closes the generator, and the child goes away with it."""
    documents = demo_documents()
    assert next(documents)["text"]
    documents.close()  # type: ignore[attr-defined]


def test_every_answer_is_in_the_corpus(corpus: list[DocumentDict]) -> None:
    """A question whose answer does not exist would measure nothing."""
    found = names(corpus)
    for question in load_questions():
        expected = {answer for answer in question.answers if sys.version_info >= SINCE.get(answer, (3, 11))}
        assert expected
        assert expected <= found, question.id


def test_the_questions_are_twenty_and_varied(corpus: list[DocumentDict]) -> None:
    """Ids are in order, and the answers lie in fifteen modules at least."""
    questions = load_questions()
    assert [question.id for question in questions] == [f"q{number:02}" for number in range(1, 21)]
    module_of = {document["id"].partition("#")[0]: document["metadata"]["module"] for document in corpus}
    assert len({module_of[question.answers[0]] for question in questions}) >= 15


@pytest.mark.parametrize(
    ("hits", "expected"),
    [(["a"], 1.0), (["x", "b#3", "a"], 0.5), (["x"] * 9 + ["a"], 0.1), (["x"] * 10 + ["a"], 0.0), ([], 0.0)],
)
def test_reciprocal_rank(hits: list[str], expected: float) -> None:
    """The first right hit counts, a chunk counts as its document, and nothing counts after the cutoff."""
    assert reciprocal_rank(hits, ("a", "b")) == expected
