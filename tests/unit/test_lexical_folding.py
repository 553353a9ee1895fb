"""The lexical index over time: folds, purges, freezing and loading, while searches go on."""

import json
import os
import random
import threading
import time

import pytest
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.ports import LexicalStatistics
from services.search.shards.files import Damaged
from services.search.shards.lexical import LexicalIndex, analyze
from services.search.shards.lexical import index as index_module

_WORDS = [f"word{number}" for number in range(80)]
_QUESTIONS = ["word1 word7 word30", "word2", "word50 word70", "word3 word4 word5 word6"]


class Corpus:
    """Random documents, some with titles, as a store has them: without those that are dead."""

    def __init__(self, count, seed=0):
        chooser = random.Random(seed)
        weights = [1 / rank for rank in range(1, len(_WORDS) + 1)]
        self.documents = {}
        for row in range(count):
            title = " ".join(chooser.choices(_WORDS, weights, k=3)) if row % 3 else None
            self.documents[row] = (title, " ".join(chooser.choices(_WORDS, weights, k=chooser.randint(10, 60))))
        self.live = BitMap(self.documents)

    def read(self, rows):
        for row in rows:
            if row in self.live:
                yield (row, *self.documents[row])

    def add(self, index, start, stop):
        for row in range(start, stop):
            index.add(row, *self.documents[row])
        return index.commit()

    def indexed(self, directory, rows=None):
        """Return one index of *rows*, all in memory: what others are compared with."""
        index = LexicalIndex(directory, "english", read=self.read)
        for row in self.live if rows is None else rows:
            index.add(row, *self.documents[row])
        return index.commit()


@pytest.fixture(autouse=True)
def folds_are_small(monkeypatch):
    """Fold and purge at a size that tests reach."""
    monkeypatch.setattr(index_module, "_FOLD_ROWS", 100)
    monkeypatch.setattr(index_module, "_FOLD_ROWS_WHEN_IDLE", 10)
    monkeypatch.setattr(index_module, "_PURGE_ROWS", 10)


def fold(index, live, *, idle=False):
    """Do what is due, and return the view after it; None when nothing is."""
    job = index.due(live, idle=idle)
    return index.swap(job, index.build(job, live, lambda: None)) if job else None


def answers(view, live, limit=1000):
    return [view.search(analyze(question), limit, allowed=live) for question in _QUESTIONS]


def assert_same(found, expected, rel):
    for some, others in zip(found, expected, strict=True):
        scores = dict(others)
        assert {row for row, _ in some} == set(scores)
        assert [score for _, score in some] == pytest.approx([scores[row] for row, _ in some], rel=rel)


@pytest.mark.parametrize("newest", [5, 90])
def test_parts_rank_as_one_index_does(tmp_path, newest):
    """Documents on the disk and in memory get the scores they have in one index, a handful in memory too."""
    corpus = Corpus(600 + newest)
    index = LexicalIndex(tmp_path / "parts", "english", read=corpus.read)
    corpus.add(index, 0, 600)
    fold(index, corpus.live)
    view = corpus.add(index, 600, 600 + newest)
    whole = corpus.indexed(tmp_path / "whole")
    assert view.num_docs == whole.num_docs == 600 + newest
    for question in _QUESTIONS:
        assert view.doc_freq(analyze(question)) == whole.doc_freq(analyze(question))
        for options in ({}, {"match": "all"}, {"match": "phrase"}, {"prefix": True}):
            found, expected = (
                dict(some.search(analyze(question), 1000, allowed=corpus.live, **options)) for some in (view, whole)
            )
            assert found == pytest.approx(expected, rel=0.01)


def test_a_fold_changes_no_answer(tmp_path):
    """The same documents match before a fold, during it and after it, with the same scores."""
    corpus = Corpus(300)
    index = LexicalIndex(tmp_path / "index", "english", read=corpus.read)
    corpus.add(index, 0, 150)
    fold(index, corpus.live)
    before = answers(corpus.add(index, 150, 300), corpus.live)
    job = index.due(corpus.live, idle=False)
    during = index.commit()
    after = index.swap(job, index.build(job, corpus.live, lambda: None))
    assert_same(answers(during, corpus.live), before, rel=1e-5)
    assert_same(answers(after, corpus.live), before, rel=0.05)
    assert_same(answers(after, corpus.live), answers(corpus.indexed(tmp_path / "whole"), corpus.live), rel=0.02)


def test_nothing_is_due_before_there_is_enough(tmp_path):
    """A small memory part is folded only when there is nothing else to do, and a tiny one never."""
    corpus = Corpus(50)
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    corpus.add(index, 0, 5)
    assert index.due(corpus.live, idle=True) is None
    corpus.add(index, 5, 50)
    assert index.due(corpus.live, idle=False) is None
    assert index.due(corpus.live, idle=True) is not None


def test_searches_go_on_while_a_fold_does(tmp_path):
    """Views taken before, during and after a fold all find everything, from several threads."""
    corpus = Corpus(1200)
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    views = [(corpus.add(index, 0, 100), 100)]
    wrong, stop = [], threading.Event()

    def search():
        while not stop.is_set():
            view, count = views[-1]
            found = view.matching(["word1"], "any", False)
            expected = sum(
                "word1 " in f"{title or ''} {text} " for title, text in list(corpus.documents.values())[:count]
            )
            if len(found) != expected or len(view.search(["word1"], 5000, allowed=corpus.live)) != expected:
                wrong.append((count, expected, len(found)))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for start in range(100, 1200, 100):
        job = index.due(corpus.live, idle=False)
        built = []
        folding = threading.Thread(
            target=lambda job=job, built=built: built.append(index.build(job, corpus.live, lambda: None))
        )
        folding.start()
        views.append((corpus.add(index, start, start + 100), start + 100))
        folding.join()
        views.append((index.swap(job, built[0]), start + 100))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fold_that_gave_up_is_done_again(tmp_path):
    """Whatever is raised while folding, before the commit or after it, nothing is lost and nothing doubled."""
    corpus = Corpus(250)
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    corpus.add(index, 0, 250)
    job = index.due(corpus.live, idle=False)
    for steps in range(1, 6):
        left = iter(range(steps))
        with pytest.raises(StopIteration):
            index.build(job, corpus.live, lambda left=left: next(left) and None)
        assert len(index.commit().matching(["word1"], "any", False)) == len(
            index.commit().search(["word1"], 999, allowed=corpus.live)
        )
    assert index.due(corpus.live, idle=False) == job
    view = index.swap(job, index.build(job, corpus.live, lambda: None))
    assert view.num_docs >= 250
    found = [row for row, _ in view.search(["word1"], 999, allowed=corpus.live)]
    assert len(found) == len(set(found))
    assert set(found) == {
        row for row, (title, text) in corpus.documents.items() if "word1" in f"{title} {text}".split()
    }


def test_a_store_that_fails_leaves_the_index_as_it_was(tmp_path):
    """An error of the reader comes through, and the documents are still found in memory."""
    corpus = Corpus(120)

    def read(rows):
        raise BackendFailed("no store")

    index = LexicalIndex(tmp_path, "english", read=read)
    expected = answers(corpus.add(index, 0, 120), corpus.live)
    job = index.due(corpus.live, idle=False)
    with pytest.raises(BackendFailed, match="no store"):
        index.build(job, corpus.live, lambda: None)
    assert answers(index.commit(), corpus.live) == expected


def test_dead_rows_are_left_out_of_folds_and_purged(tmp_path):
    """Dead rows are not written to the disk; a fifth of dead ones there is purged, and scores are then as without them."""
    corpus = Corpus(400)
    index = LexicalIndex(tmp_path / "index", "english", read=corpus.read)
    corpus.add(index, 0, 200)
    corpus.live -= BitMap(range(50))
    view = fold(index, corpus.live)
    assert view.num_docs == 150
    corpus.add(index, 200, 400)
    fold(index, corpus.live)
    corpus.live -= BitMap(range(50, 120))
    assert index.commit().matching(["word1"], "any", False) & BitMap(range(50, 120))
    job = index.due(corpus.live, idle=False)
    assert job.purge
    view = index.swap(job, index.build(job, corpus.live, lambda: None))
    assert not view.matching(["word1"], "any", False) & BitMap(range(120))
    assert index.due(corpus.live, idle=True) is None
    expected = answers(corpus.indexed(tmp_path / "whole"), corpus.live)
    for found, other in zip(answers(view, corpus.live), expected, strict=True):
        assert {row for row, _ in found} == {row for row, _ in other}


def test_frequencies_are_never_above_the_documents_they_are_of(tmp_path):
    """After a purge Tantivy counts the dead ones until it merges: in the number of documents too."""
    corpus = Corpus(200)
    corpus.documents = dict.fromkeys(range(200), (None, "apple"))
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    corpus.add(index, 0, 200)
    fold(index, corpus.live)
    corpus.live = BitMap(range(190, 200))
    view = fold(index, corpus.live)
    assert len(view.search(["appl"], 100, allowed=corpus.live)) == 10
    assert 10 <= view.doc_freq(["appl"])["appl"] <= view.num_docs


@pytest.fixture
def frozen(tmp_path):
    """An index with documents on the disk, purged ones, and some in memory, and its frozen state."""
    corpus = Corpus(330)
    index = LexicalIndex(tmp_path / "live", "english", read=corpus.read)
    corpus.add(index, 0, 150)
    fold(index, corpus.live)
    corpus.live -= BitMap(range(40))
    corpus.add(index, 150, 300)
    fold(index, corpus.live)
    view = corpus.add(index, 300, 330)
    state = json.loads(json.dumps(index.freeze(tmp_path / "frozen")))
    return corpus, index, view, state


def restored(tmp_path, name="again"):
    (tmp_path / name).mkdir()
    for path in (tmp_path / "frozen").iterdir():
        os.link(path, tmp_path / name / path.name)
    return tmp_path / name


def test_a_loaded_index_answers_as_the_one_that_was_frozen(tmp_path, frozen):
    """What was folded comes from the files, the rest is added again; then it goes on folding."""
    corpus, index, view, state = frozen
    assert state["rows"] == 300
    again = LexicalIndex.load(restored(tmp_path), "english", state, read=corpus.read)
    loaded = corpus.add(again, state["rows"], 330)
    assert answers(loaded, corpus.live) == answers(view, corpus.live)
    assert again.disk_bytes == index.disk_bytes > 0
    assert_same(answers(fold(again, corpus.live, idle=True), corpus.live), answers(view, corpus.live), rel=0.05)


def test_what_is_frozen_never_changes(tmp_path, frozen):
    """Folds of the index it was taken from, and of one that was loaded from links to it, leave the files as they are."""
    corpus, index, _, state = frozen
    before = {path.name: path.read_bytes() for path in (tmp_path / "frozen").iterdir()}
    assert set(before) == set(state["files"])
    corpus.documents |= dict.fromkeys(range(330, 700), (None, "word1 new"))
    corpus.live |= BitMap(range(330, 700))
    again = LexicalIndex.load(restored(tmp_path), "english", state, read=corpus.read)
    corpus.add(again, 300, 330)
    for some in (index, again):
        for start in range(330, 700, 37):
            corpus.add(some, start, start + 37 if start + 37 <= 700 else 700)
            fold(some, corpus.live, idle=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "frozen").iterdir()} == before
    LexicalIndex.load(restored(tmp_path, "third"), "english", state, read=corpus.read)


def test_freezing_during_a_fold_has_the_state_before_it(tmp_path, frozen):
    """Until a fold is swapped in, what is frozen is what searches use, although more has been committed."""
    corpus, index, _, state = frozen
    job = index.due(corpus.live, idle=True)
    built = index.build(job, corpus.live, lambda: None)
    assert index.freeze(tmp_path / "during") == state
    index.swap(job, built)
    assert index.freeze(tmp_path / "after")["rows"] == 330


def test_every_damaged_file_is_noticed(tmp_path, frozen):
    """A file that is missing, cut or altered in one bit is reported, never searched."""
    corpus, _, _, state = frozen
    for number, name in enumerate(sorted(state["files"])):
        for kind in ("missing", "cut", "altered"):
            directory = restored(tmp_path, f"{number}-{kind}")
            data = (directory / name).read_bytes()
            (directory / name).unlink()
            if kind == "cut":
                (directory / name).write_bytes(data[:-1])
            elif kind == "altered":
                (directory / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(Damaged):
                LexicalIndex.load(directory, "english", state, read=corpus.read)


@pytest.mark.parametrize("missing", ["rows", "files", "indexed", "format", "length"])
def test_a_damaged_state_is_noticed(tmp_path, frozen, missing):
    """A state that lacks something, or is of another language, is reported as damage."""
    corpus, _, _, state = frozen
    with pytest.raises(Damaged):
        LexicalIndex.load(restored(tmp_path), "german", state, read=corpus.read)
    del state[missing]
    with pytest.raises(Damaged):
        LexicalIndex.load(restored(tmp_path, "b"), "english", state, read=corpus.read)


def test_an_empty_index_is_frozen_and_loaded(tmp_path):
    """Before the first fold there are no files, and all rows are to be added again."""
    corpus = Corpus(20)
    index = LexicalIndex(tmp_path / "live", "english", read=corpus.read)
    view = corpus.add(index, 0, 20)
    state = index.freeze(tmp_path / "frozen")
    assert (state["rows"], state["files"]) == (0, {})
    again = LexicalIndex.load(restored(tmp_path), "english", state, read=corpus.read)
    assert answers(corpus.add(again, 0, 20), corpus.live) == answers(view, corpus.live)


def threads_above(count):
    """Return how many more threads there are than *count*, once those that are ending have ended."""
    for _ in range(500):
        more = len(os.listdir("/proc/self/task")) - count
        if more <= 0:
            return 0
        time.sleep(0.01)
    return more


def test_an_index_at_rest_has_no_threads(tmp_path):
    """Writers' threads end when there is nothing to write, and memory is still searched and written afterwards."""
    corpus = Corpus(60)
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    before = len(os.listdir("/proc/self/task"))
    corpus.add(index, 0, 30)
    assert len(os.listdir("/proc/self/task")) > before
    fold(index, corpus.live, idle=True)
    assert index.due(corpus.live, idle=True) is None
    assert threads_above(before) == 0
    corpus.add(index, 30, 35)
    assert index.due(corpus.live, idle=True) is None
    assert threads_above(before) == 0
    view = corpus.add(index, 35, 60)
    assert view.num_docs == 60


def test_statistics_of_other_shards_weigh_in_every_part(tmp_path):
    """A term's weight over all shards is the same for its documents on the disk and in memory."""
    corpus = Corpus(0)
    corpus.documents = dict.fromkeys(range(120), (None, "apple pear"))
    corpus.live = BitMap(range(120))
    index = LexicalIndex(tmp_path, "english", read=corpus.read)
    corpus.add(index, 0, 110)
    fold(index, corpus.live)
    view = corpus.add(index, 110, 120)
    hits = view.search(["appl"], 120, statistics=LexicalStatistics(100_000, {"appl": 120}), allowed=corpus.live)
    assert len(hits) == 120
    assert [score for _, score in hits] == pytest.approx([hits[0][1]] * 120, rel=1e-4)
