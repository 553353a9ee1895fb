"""The lexical index: analysis, scores that compare between shards, and filtering that misses nothing."""

import random
import threading

import pytest
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.ports import LexicalStatistics
from services.search.shards.lexical import LexicalIndex, analyze, idf

_WORDS = [f"word{number}" for number in range(60)]


def corpus(count, seed=0):
    """Documents of words whose frequencies fall off as in real text."""
    chooser = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(_WORDS) + 1)]
    return [" ".join(chooser.choices(_WORDS, weights, k=chooser.randint(20, 30))) for _ in range(count)]


def indexed(texts, *, first_row=0):
    """Return a view of *texts* under consecutive rows."""
    index = LexicalIndex()
    for row, text in enumerate(texts, first_row):
        index.add(row, None, text)
    return index.commit()


def test_analysis_folds_case_accents_and_endings():
    """Words that differ in case, accents or inflection are one term."""
    assert analyze("Running CAFÉS, naïvely!") == analyze("runs cafe naively") == ["run", "cafe", "naiv"]


def test_analysis_keeps_repetitions_and_stop_words():
    """Terms come in order, as often as they occur, the commonest words too."""
    assert analyze("to be or not to be") == ["to", "be", "or", "not", "to", "be"]


@pytest.mark.parametrize("text", ["", "  ", "!?*", '"', "\u0000", "🙂"])
def test_text_without_words_has_no_terms(text):
    """Punctuation alone is not searched for."""
    assert analyze(text) == []


def test_analysis_may_run_in_many_threads():
    """The one analyser is shared by all threads."""
    text = " ".join(corpus(50))
    expected = analyze(text)
    wrong = []

    def work():
        wrong.extend(1 for _ in range(100) if analyze(text) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_statistics_make_scores_of_shards_compare():
    """A corpus in three shards, one of them lopsided, is ranked as it is in one, with nearly the same scores."""
    texts = corpus(900)
    # Sorted, so that each slice has its own document frequencies.
    texts.sort(key=lambda text: text.count("word1 "))
    whole = indexed(texts)
    shards = [indexed(texts[start : start + 300], first_row=start) for start in (0, 300, 600)]
    query = analyze("word1 word20 word40 word55")
    total = sum(shard.num_docs for shard in shards)
    frequencies = [shard.doc_freq(query) for shard in shards]
    everywhere = {term: sum(frequency[term] for frequency in frequencies) for term in query}
    assert (total, everywhere) == (whole.num_docs, whole.doc_freq(query))

    expected = whole.search(query, 50)
    statistics = LexicalStatistics(total, everywhere)
    found = [hit for shard in shards for hit in shard.search(query, 50, statistics=statistics)]
    found.sort(key=lambda hit: -hit[1])
    # What is left of a difference is the average length, which Tantivy takes from the shard.
    for (_, score), (_, other) in zip(found[:50], expected, strict=True):
        assert score == pytest.approx(other, rel=0.01)
    assert len({row for row, _ in found[:50]} & {row for row, _ in expected}) >= 48

    uncorrected = max(hit[1] for hit in shards[2].search(query, 1))
    assert uncorrected != pytest.approx(expected[0][1], rel=0.01)


@pytest.mark.parametrize("allowed_rows", [1, 40, 1000, 1001, 1400])
@pytest.mark.parametrize("limit", [1, 10, 100])
def test_filtering_misses_nothing(allowed_rows, limit):
    """The best allowed rows come back with their scores, however few are allowed and wherever they rank."""
    view = indexed(corpus(1500))
    everything = view.search(analyze("word1 word2"), 1500)
    # The worst of them: those that a search for the best would never meet.
    allowed = BitMap([row for row, _ in everything[-allowed_rows:]])
    expected = [(row, score) for row, score in everything if row in allowed][:limit]
    found = view.search(analyze("word1 word2"), limit, allowed=allowed)
    assert len(found) == len(expected)
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
    assert {row for row, _ in found} <= set(allowed)


def test_rows_that_are_allowed_but_do_not_match_are_not_found():
    """A filter never adds rows that have none of the terms."""
    view = indexed(["apple", "pear", "apple pear"])
    assert view.search(analyze("apple"), 10, allowed=BitMap([1])) == []
    assert view.search(analyze("apple"), 10, allowed=BitMap()) == []


def test_a_view_never_changes():
    """What is written later, committed or not, is not in a view that was taken before."""
    index = LexicalIndex()
    index.add(0, None, "apple")
    before = index.commit()
    index.remove(0)
    index.add(1, None, "apple")
    assert [row for row, _ in before.search(["appl"], 10)] == [0]
    after = index.commit()
    assert [row for row, _ in before.search(["appl"], 10)] == [0]
    assert [row for row, _ in after.search(["appl"], 10)] == [1]


def test_rolling_back_forgets_what_was_not_committed():
    """After a rollback neither additions nor removals have happened."""
    index = LexicalIndex()
    index.add(0, None, "apple")
    index.commit()
    index.remove(0)
    index.add(1, None, "apple")
    index.rollback()
    assert [row for row, _ in index.commit().search(["appl"], 10)] == [0]


def test_the_title_counts_more_than_the_text():
    """A word in the title outweighs the same word in a text of the same length."""
    index = LexicalIndex()
    index.add(0, "pear", "apple apple plum")
    index.add(1, "apple", "pear plum plum")
    view = index.commit()
    assert [row for row, _ in view.search(analyze("pear"), 10)] == [0, 1]


def test_the_idf_is_tantivys_own():
    """The score of a term that is boosted by an IDF is that times the unboosted one: the formula is the engine's."""
    view = indexed(["apple", "pear", "pear", "plum"])
    (_, plain), (_, boosted) = (
        view.search(["appl"], 1, statistics=statistics)[0]
        for statistics in (None, LexicalStatistics(1000, {"appl": 3}))
    )
    assert boosted / plain == pytest.approx(idf(1000, 3) / idf(4, 1), rel=1e-5)


def test_frequencies_count_deleted_documents_as_bm25_does():
    """A document frequency is never above the document count that goes with it, after deletions too."""
    index = LexicalIndex()
    for row in range(20):
        index.add(row, None, "apple")
    index.commit()
    for row in range(19):
        index.remove(row)
    view = index.commit()
    assert len(view.search(["appl"], 100)) == 1
    assert 1 <= view.doc_freq(["appl"])["appl"] <= view.num_docs


def test_a_writer_that_dies_is_replaced():
    """A failed write is reported as a backend failure, and the next write works."""
    index = LexicalIndex()
    index.add(0, None, "apple")
    index.commit()
    with pytest.raises(BackendFailed):
        index._write("add_document", "not a document")
    index.add(1, None, "apple")
    assert sorted(row for row, _ in index.commit().search(["appl"], 10)) == [0, 1]
