"""The lexical index: analysis, scores that compare between shards, and filtering that misses nothing."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.ports import LexicalStatistics
from services.search.shards.lexical import LANGUAGES, LexicalIndex, analyze, idf, question_terms
from services.search.shards.lexical.analysis import located

_WORDS = [f"word{number}" for number in range(60)]


def corpus(count, seed=0):
    """Documents of words whose frequencies fall off as in real text."""
    chooser = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(_WORDS) + 1)]
    return [" ".join(chooser.choices(_WORDS, weights, k=chooser.randint(20, 30))) for _ in range(count)]


class Indexes:
    """Makes lexical indexes in directories of their own, with everything allowed in searches unless said otherwise."""

    def __init__(self, directory):
        self._directory = directory
        self._count = 0

    def new(self, language="english"):
        self._count += 1
        return LexicalIndex(self._directory / str(self._count), language, read=lambda rows: [])

    def of(self, texts, *, first_row=0, language="english"):
        """Return a view of *texts* under consecutive rows."""
        index = self.new(language)
        for row, text in enumerate(texts, first_row):
            index.add(row, None, text)
        return index.commit()


@pytest.fixture
def indexes(tmp_path):
    return Indexes(tmp_path)


ALL = BitMap(range(10_000))


def rows(view, question, *, language="english", allowed=ALL, **options):
    """Return the rows that a question in words finds, in order of their numbers."""
    return sorted(row for row, _ in view.search(analyze(question, language), 100, allowed=allowed, **options))


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


def test_statistics_make_scores_of_shards_compare(indexes):
    """A corpus in three shards, one of them lopsided, is ranked as it is in one, with nearly the same scores."""
    texts = corpus(900)
    # Sorted, so that each slice has its own document frequencies.
    texts.sort(key=lambda text: text.count("word1 "))
    whole = indexes.of(texts)
    shards = [indexes.of(texts[start : start + 300], first_row=start) for start in (0, 300, 600)]
    query = analyze("word1 word20 word40 word55")
    total = sum(shard.num_docs for shard in shards)
    frequencies = [shard.doc_freq(query) for shard in shards]
    everywhere = {term: sum(frequency[term] for frequency in frequencies) for term in query}
    assert (total, everywhere) == (whole.num_docs, whole.doc_freq(query))

    expected = whole.search(query, 50, allowed=ALL)
    statistics = LexicalStatistics(total, everywhere)
    found = [hit for shard in shards for hit in shard.search(query, 50, statistics=statistics, allowed=ALL)]
    found.sort(key=lambda hit: -hit[1])
    # What is left of a difference is the average length, which Tantivy takes from the shard.
    for (_, score), (_, other) in zip(found[:50], expected, strict=True):
        assert score == pytest.approx(other, rel=0.01)
    assert len({row for row, _ in found[:50]} & {row for row, _ in expected}) >= 48

    uncorrected = max(hit[1] for hit in shards[2].search(query, 1, allowed=ALL))
    assert uncorrected != pytest.approx(expected[0][1], rel=0.01)


@pytest.mark.parametrize("allowed_rows", [1, 40, 1000, 1001, 1400])
@pytest.mark.parametrize("limit", [1, 10, 100])
def test_filtering_misses_nothing(indexes, allowed_rows, limit):
    """The best allowed rows come back with their scores, however few are allowed and wherever they rank."""
    view = indexes.of(corpus(1500))
    everything = view.search(analyze("word1 word2"), 1500, allowed=ALL)
    # The worst of them: those that a search for the best would never meet.
    allowed = BitMap([row for row, _ in everything[-allowed_rows:]])
    expected = [(row, score) for row, score in everything if row in allowed][:limit]
    found = view.search(analyze("word1 word2"), limit, allowed=allowed)
    assert len(found) == len(expected)
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
    assert {row for row, _ in found} <= set(allowed)


def test_rows_that_are_allowed_but_do_not_match_are_not_found(indexes):
    """A filter never adds rows that have none of the terms."""
    view = indexes.of(["apple", "pear", "apple pear"])
    assert view.search(analyze("apple"), 10, allowed=BitMap([1])) == []
    assert view.search(analyze("apple"), 10, allowed=BitMap()) == []


def test_a_view_never_changes(indexes):
    """What is written later, committed or not, is not in a view that was taken before."""
    index = indexes.new()
    index.add(0, None, "apple")
    before = index.commit()
    index.add(1, None, "apple")
    assert [row for row, _ in before.search(["appl"], 10, allowed=ALL)] == [0]
    after = index.commit()
    assert [row for row, _ in before.search(["appl"], 10, allowed=ALL)] == [0]
    assert [row for row, _ in after.search(["appl"], 10, allowed=ALL)] == [0, 1]


def test_rolling_back_forgets_what_was_not_committed(indexes):
    """After a rollback additions have not happened."""
    index = indexes.new()
    index.add(0, None, "apple")
    index.commit()
    index.add(1, None, "apple")
    index.rollback()
    assert [row for row, _ in index.commit().search(["appl"], 10, allowed=ALL)] == [0]


def test_the_title_counts_more_than_the_text(indexes):
    """A word in the title outweighs the same word in a text of the same length."""
    index = indexes.new()
    index.add(0, "pear", "apple apple plum")
    index.add(1, "apple", "pear plum plum")
    view = index.commit()
    assert [row for row, _ in view.search(analyze("pear"), 10, allowed=ALL)] == [0, 1]


def test_the_idf_is_tantivys_own(indexes):
    """The score of a term that is boosted by an IDF is that times the unboosted one: the formula is the engine's."""
    view = indexes.of(["apple", "pear", "pear", "plum"])
    (_, plain), (_, boosted) = (
        view.search(["appl"], 1, statistics=statistics, allowed=ALL)[0]
        for statistics in (None, LexicalStatistics(1000, {"appl": 3}))
    )
    assert boosted / plain == pytest.approx(idf(1000, 3) / idf(4, 1), rel=1e-5)


def test_a_writer_that_dies_is_replaced(indexes):
    """A failed write is reported as a backend failure, and the next write works."""
    index = indexes.new()
    index.add(0, None, "apple")
    index.commit()
    with pytest.raises(BackendFailed):
        index.add(-1, None, "rows are not negative")
    index.add(1, None, "apple")
    assert sorted(row for row, _ in index.commit().search(["appl"], 10, allowed=ALL)) == [0, 1]


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("english", "connections", "connected"),
        ("german", "Häuser", "Haus"),
        ("french", "chanteuses", "chanteuse"),
        ("spanish", "canciones", "canción"),
        ("russian", "книги", "книга"),
        ("swedish", "flickorna", "flicka"),
    ],
)
def test_stemming_is_that_of_the_language(indexes, language, one, other):
    """Forms of one word find each other in their language, and not where nothing is stemmed."""
    assert rows(indexes.of([one], language=language), other, language=language) == [0]
    assert rows(indexes.of([one], language="none"), other, language="none") == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_that_is_named_can_be_indexed(indexes, language):
    """A document is found by its own words in every language."""
    text = "Zürich 2024 東京都 سلام"
    assert rows(indexes.of([text], language=language), text, language=language, match="all") == [0]


def test_a_language_that_is_unknown_is_refused():
    """The message names the languages there are."""
    with pytest.raises(ValueError, match=r"klingon.*english"):
        analyze("text", "klingon")


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("What is the capital of France?", "english", ["capit", "franc"]),
        ("to be or not to be", "english", ["to", "be", "or", "not", "to", "be"]),
        ("das ist der Kanzler", "german", ["kanzl"]),
        ("the capital", "none", ["the", "capital"]),
        ("", "english", []),
    ],
)
def test_stop_words_are_left_out_of_questions_that_have_others(text, language, expected):
    """The commonest words go, unless there would be nothing left to ask."""
    assert question_terms(text, language, stop_words=False) == expected
    assert question_terms(text, language, stop_words=True) == analyze(text, language)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("私は東京都に住んでいます", "東京都"),
        ("我们在北京大学学习", "北京大学"),
        ("ｶﾞﾗｽの窓", "ガラス"),
        ("บริษัทนี้อยู่ในกรุงเทพ", "กรุงเทพ"),
        ("서울에서 만나요", "서울"),
        ("新しいiPhone用ケース", "iphone"),
        ("猫が好き", "猫"),
        ("黒い猫", "猫"),
    ],
)
@pytest.mark.parametrize("match", ["any", "all", "phrase"])
def test_words_are_found_in_text_without_spaces(indexes, text, question, match):
    """A part of a run in a script without spaces is found, a single character too; other text is not."""
    view = indexes.of(["天気予報 and other words", text])
    assert rows(view, question, match=match) == [1]


def test_letters_with_separate_marks_are_the_same_letters():
    """Decomposed text, as some file systems and editors write it, has the terms of composed text."""
    assert analyze("cafe\u0301 nai\u0308ve") == analyze("café naïve") == ["cafe", "naiv"]


@given(st.text(st.sampled_from("ab Z.é\u0301東京カｶﾞ々กี่ๆ서울ßﬁ🙂\n"), max_size=30))
@settings(max_examples=150, deadline=None)
def test_terms_and_their_places_agree_with_the_index(text):
    """Terms with places are exactly the indexed terms, each within the text."""
    for language in ("english", "french", "none"):
        found = located(text, language)
        assert [place.term for place in found] == analyze(text, language)
        assert all(0 <= place.start < place.end <= len(text) for place in found)


def test_all_and_phrase_ask_for_more_than_any(indexes):
    """Any of the words, all of them, or all of them one after the other."""
    view = indexes.of(["red car", "car red", "red", "a red sports car", "blue"])
    assert rows(view, "red car") == [0, 1, 2, 3]
    assert rows(view, "red car", match="all") == [0, 1, 3]
    assert rows(view, "red car", match="phrase") == [0]
    assert rows(view, "red", match="phrase") == [0, 1, 2, 3]
    assert rows(view, "red boat", match="all") == rows(view, "red boat", match="phrase") == []


def test_a_phrase_does_not_run_from_the_title_into_itself(indexes):
    """The title is indexed twice, but its end and its beginning are not neighbours."""
    index = indexes.new()
    index.add(0, "apple pie", "cake")
    view = index.commit()
    assert rows(view, "apple pie", match="phrase") == [0]
    assert rows(view, "pie apple", match="phrase") == rows(view, "pie cake", match="phrase") == []


@pytest.mark.parametrize("typed", ["r", "ru", "run", "runn", "runni", "runnin", "running"])
@pytest.mark.parametrize("match", ["any", "all", "phrase"])
def test_a_half_typed_word_is_found_at_every_letter(indexes, typed, match):
    """With prefix the last word stands for what it may become, past its stem too."""
    view = indexes.of(["fast running", "fast swimming"])
    question = analyze(f"fast {typed}")
    found = view.search(question, 10, allowed=ALL, match=match, prefix=True)
    assert found[0][0] == 0
    assert len(found) == (2 if match == "any" else 1)
    assert rows(view, typed, match=match, prefix=True) == [0]


def test_a_prefix_with_signs_that_mean_something_in_expressions_is_harmless(indexes):
    """Folding may leave brackets in a term: they stand for themselves."""
    view = indexes.of(["case ⑴ two", "case other"])
    assert rows(view, "case ⑴", match="all", prefix=True) == rows(view, "case ⑴", match="phrase", prefix=True) == [0]


_VOCABULARY = ["red", "green", "greens", "blue", "東京", "京都"]


@given(
    st.lists(st.lists(st.sampled_from(_VOCABULARY), max_size=5), min_size=1, max_size=8),
    st.lists(st.sampled_from(_VOCABULARY), min_size=1, max_size=3),
    st.sampled_from(["any", "all", "phrase"]),
    st.booleans(),
    st.sets(st.integers(0, 7)),
)
@settings(max_examples=60, deadline=None)
def test_what_matches_is_what_a_plain_reading_says(tmp_path_factory, texts, words, match, prefix, allowed):
    """Matching agrees with a naive model over lists of terms, and so do searches among the allowed rows."""
    view = Indexes(tmp_path_factory.mktemp("model")).of([" ".join(text) for text in texts], language="none")
    question = [term for word in words for term in analyze(word, "none")]

    def fits(term, place):
        return term.startswith(question[place]) if prefix and place == len(question) - 1 else term == question[place]

    def matches(terms):
        places = range(len(question))
        if match == "phrase":
            starts = range(len(terms) - len(question) + 1)
            return any(all(fits(terms[start + place], place) for place in places) for start in starts)
        return (all if match == "all" else any)(any(fits(term, place) for term in terms) for place in places)

    expected = {row for row, text in enumerate(texts) if matches([t for word in text for t in analyze(word, "none")])}
    assert set(view.matching(question, match, prefix)) == expected
    found = view.search(question, 100, allowed=BitMap(allowed), match=match, prefix=prefix)
    assert {row for row, _ in found} == expected & allowed
