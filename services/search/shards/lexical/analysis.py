"""
How text becomes terms, the same for documents and questions.

Words are what Tantivy's simple tokenizer splits, in lower case, without accents, stemmed per language. Scripts that do
not put spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese; Korean too, whose particles hang on to words)
are cut into overlapping pairs of characters: 東京都 is 東京, 京都. Tantivy cannot do that by itself, so such runs are
respelled with spaces before it sees them; text without them only pays for a search by one regular expression.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import tantivy

NO_STEMMING = "none"
LANGUAGES = (
    "arabic",
    "danish",
    "dutch",
    "english",
    "finnish",
    "french",
    "german",
    "greek",
    "hungarian",
    "italian",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
    NO_STEMMING,
)
MAX_TERM_BYTES = 64

# fmt: off
_HAVE_STOP_WORDS = frozenset([
    "danish", "dutch", "finnish", "french", "german", "hungarian", "italian", "norwegian", "portuguese", "russian",
    "spanish", "swedish",
])
# Tantivy's English list has 33 words, and none that questions begin with.
_ENGLISH_STOP_WORDS = [
    "a", "about", "am", "an", "and", "any", "are", "as", "at", "be", "been", "being", "but", "by", "can", "could",
    "did", "do", "does", "doing", "don", "for", "from", "had", "has", "have", "having", "he", "her", "here", "hers",
    "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "itself", "just", "me", "my", "no", "not", "of",
    "on", "or", "our", "ours", "s", "she", "should", "so", "some", "such", "t", "than", "that", "the", "their",
    "theirs", "them", "then", "there", "these", "they", "this", "those", "to", "too", "us", "very", "was", "we", "were",
    "what", "when", "where", "which", "while", "who", "whom", "whose", "why", "will", "with", "would", "you", "your",
    "yours",
]
# fmt: on

# Endings that a half-typed word may be in the middle of.
_ENDINGS = {
    "english": [
        "able",
        "ably",
        "ation",
        "ations",
        "ed",
        "er",
        "ers",
        "es",
        "ies",
        "ing",
        "ings",
        "ity",
        "ly",
        "ment",
        "ments",
        "ness",
    ],
}
_SHORTEST_HALF_TYPED = 4

_MARKS = "\u0300-\u036f"
_SPACELESS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\u1100-\u11ff\u1780-\u17d3"
    "\u2e80-\u2fdf\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97c\uac00-\ud7fb\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SPECIAL = re.compile(f"(?P<run>[{_SPACELESS}]+)|\\w[{_MARKS}]+")
_RUN = re.compile(f"[{_SPACELESS}]+")


@dataclass(frozen=True, slots=True)
class Located:
    """A term of a text and where it is: from character *start* up to but not including *end*."""

    term: str
    start: int
    end: int


@lru_cache(maxsize=2 * len(LANGUAGES))
def analyzer(language: str, stop_words: bool = True) -> tantivy.TextAnalyzer:
    """Return Tantivy's part of the analysis, for text that `respelled` has seen. Any number of threads may share it."""
    if language not in LANGUAGES:
        raise ValueError(f"There is no analysis for the language {language!r}; there is for {', '.join(LANGUAGES)}.")
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    builder = builder.filter(tantivy.Filter.remove_long(MAX_TERM_BYTES)).filter(tantivy.Filter.lowercase())
    if not stop_words and language == "english":
        builder = builder.filter(tantivy.Filter.custom_stopword(_ENGLISH_STOP_WORDS))
    elif not stop_words and language in _HAVE_STOP_WORDS:
        builder = builder.filter(tantivy.Filter.stopword(language))
    fold = tantivy.Filter.ascii_fold()
    if language == NO_STEMMING:
        return builder.filter(fold).build()
    stemmer = tantivy.Filter.stemmer(language)
    # Other languages' stemmers know endings by their accents.
    first, second = (fold, stemmer) if language == "english" else (stemmer, fold)
    return builder.filter(first).filter(second).build()


def analyze(text: str, language: str = "english") -> list[str]:
    """
    Return the terms of *text* in order, repeated as often as they occur: exactly what a document is indexed by.

    Raises ValueError for a language that is not in LANGUAGES.
    """
    terms: list[str] = analyzer(language).analyze(respelled(text))
    return terms


def question_terms(text: str, language: str, *, stop_words: bool) -> list[str]:
    """
    Return the terms of a question, as `analyze` does.

    With *stop_words* False the language's commonest words are left out, unless the question has no others. For Arabic,
    Greek, Romanian, Tamil, Turkish and "none" no such list is known, and nothing is left out.
    """
    if not stop_words:
        terms: list[str] = analyzer(language, stop_words=False).analyze(respelled(text))
        if terms:
            return terms
    return analyze(text, language)


def located(text: str, language: str) -> list[Located]:
    """Return the terms of *text* with their places in it: the same terms as `analyze`, in the same order."""
    spelled, places = _placed(text)
    tokens = analyzer(language).pre_tokenize(spelled).tokens
    spans = ((token.text, token.char_offset_from, token.char_offset_to) for token in tokens)
    if places is None:
        return [Located(term, start, end) for term, start, end in spans]
    return [Located(term, places[start][0], places[end - 1][1]) for term, start, end in spans]


def respelled(text: str) -> str:
    """Return *text* with spaces between what are terms in scripts without spaces, and letters with their marks."""
    if text.isascii() or _SPECIAL.search(text) is None:
        return text
    return _SPECIAL.sub(_respelled_piece, text)


def single_characters(text: str) -> list[str]:
    """Return the characters of scripts without spaces that *text* has, for questions of a single one."""
    if text.isascii():
        return []
    return [character for run in _RUN.findall(text) for character, _, _ in _characters(run)]


@lru_cache(maxsize=4096)
def is_single_character(term: str) -> bool:
    """Say whether *term* is one character of a script without spaces."""
    return _RUN.fullmatch(term) is not None and len(list(_characters(term))) == 1


@lru_cache(maxsize=1024)
def half_typed(word: str, language: str) -> frozenset[str]:
    """
    Return the stems of words that *word* may be the beginning of, and that do not begin with it themselves.

    A stem is often shorter than what has been typed of a word: "runni" is on the way to "running", which is indexed as
    "run". Endings are known for English only; elsewhere a half-typed word is found while it is no longer than its stem.
    """
    if len(word) < _SHORTEST_HALF_TYPED:
        return frozenset()
    whole = (
        word[:-typed] + ending
        for ending in _ENDINGS.get(language, ())
        for typed in range(1, len(ending))
        if word.endswith(ending[:typed])
    )
    return frozenset(stem for term in whole for stem in analyze(term, language) if not stem.startswith(word))


def _respelled_piece(match: re.Match[str]) -> str:
    if match["run"] is None:
        return re.sub(f"[{_MARKS}]", "", unicodedata.normalize("NFC", match[0]))
    return f" {' '.join(text for text, _, _ in _pairs(match[0]))} "


def _placed(text: str) -> tuple[str, list[tuple[int, int]] | None]:
    """Return `respelled(text)` and, for each of its characters, where it is from; None when each is its own."""
    if text.isascii() or _SPECIAL.search(text) is None:
        return text, None
    spelled: list[str] = []
    places: list[tuple[int, int]] = []
    done = 0

    def put(piece: str, start: int, end: int) -> None:
        spelled.append(piece)
        places.extend([(start, end)] * len(piece))

    for match in _SPECIAL.finditer(text):
        spelled.append(text[done : match.start()])
        places.extend((place, place + 1) for place in range(done, match.start()))
        done = match.end()
        if match["run"] is None:
            put(_respelled_piece(match), match.start(), done)
            continue
        put(" ", match.start(), match.start())
        for piece, start, end in _pairs(match[0]):
            put(piece, match.start() + start, match.start() + end)
            put(" ", match.start() + end, match.start() + end)
    spelled.append(text[done:])
    places.extend((place, place + 1) for place in range(done, len(text)))
    return "".join(spelled), places


def _pairs(run: str) -> list[tuple[str, int, int]]:
    """Return the terms of a run without spaces and where they are in it."""
    found = list(_characters(run))
    if len(found) < 2:
        return found
    return [(one + two, start, end) for (one, start, _), (two, _, end) in pairwise(found)]


def _characters(run: str) -> Iterator[tuple[str, int, int]]:
    """Yield the characters of a run, each with its marks and in its usual width, and where they are in it."""
    start = 0
    while start < len(run):
        end = start + 1
        while end < len(run) and _is_mark(run[end]):
            end += 1
        usual = "".join(filter(_is_of_words, unicodedata.normalize("NFKC", run[start:end])))
        if usual:
            yield usual, start, end
        start = end


@lru_cache(maxsize=4096)
def _is_mark(character: str) -> bool:
    return character in "\uff9e\uff9f" or unicodedata.category(character) in ("Mn", "Mc")


@cache
def _plain() -> tantivy.TextAnalyzer:
    return tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).build()


@lru_cache(maxsize=65536)
def _is_of_words(character: str) -> bool:
    """Say whether Tantivy's tokenizer leaves *character* in a word: not Thai tone marks, for one."""
    return bool(_plain().analyze(f"a{character}") == [f"a{character}"])
