"""The passage of a text that has most of a question's words, and where they are in it."""

import re
from collections import Counter
from collections.abc import Sequence

from services.search.ports import Highlight
from services.search.shards.lexical.analysis import Located, located

_SENTENCE_START = re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])|\n+")
_SPACE = re.compile(r"\s")
# How much of a passage may be given up for the sake of ending it where a word or a sentence does.
_WORD_SHARE, _SENTENCE_SHARE = 0.25, 0.5


class TantivyHighlighter:
    """Finds passages with the analysis that documents are indexed by: a word is marked wherever it would be found."""

    def highlight(self, text: str, terms: Sequence[str], language: str, *, max_chars: int) -> Highlight | None:
        """
        Return the best passage of at most *max_chars* characters; None where *text* has none of *terms*.

        Best is the one with most different terms, then most of them in all, then the earliest. It begins with a sentence
        or with a word, and ends with one, where that leaves enough of it. Marks are in order and apart from each other.
        """
        wanted = set(terms)
        found = [place for place in located(text, language) if place.term in wanted and place.end > place.start]
        cluster = _densest(found, max_chars)
        if not cluster:
            return None
        start, end = _passage(text, cluster[0].start, max(place.end for place in cluster), max_chars)
        marks: list[tuple[int, int]] = []
        for place in found:
            if place.start < start or place.end > end:
                continue
            if marks and place.start - start < marks[-1][1]:
                marks[-1] = (marks[-1][0], max(marks[-1][1], place.end - start))
            else:
                marks.append((place.start - start, place.end - start))
        return Highlight(text[start:end], marks)


def _densest(found: Sequence[Located], max_chars: int) -> Sequence[Located]:
    """Return the best consecutive places that lie within *max_chars*."""
    best: Sequence[Located] = ()
    score = (0, 0)
    inside: Counter[str] = Counter()
    first = 0
    for last, place in enumerate(found):
        inside[place.term] += 1
        while first <= last and place.end - found[first].start > max_chars:
            inside[found[first].term] -= 1
            inside += Counter()  # forgets what is not there any more
            first += 1
        if (len(inside), last - first + 1) > score:
            score = (len(inside), last - first + 1)
            best = found[first : last + 1]
    return best


def _passage(text: str, start: int, end: int, max_chars: int) -> tuple[int, int]:
    """Return a passage of up to *max_chars* around *start* to *end*, with as much of what follows as of what precedes."""
    if len(text) <= max_chars:
        return 0, len(text)
    spare = max_chars - (end - start)
    earliest = max(0, min(start - spare // 2, len(text) - max_chars))
    begin = _beginning(text, earliest, start, spare)
    latest = min(len(text), begin + max_chars)
    return begin, _ending(text, end, latest, spare)


def _beginning(text: str, earliest: int, start: int, spare: int) -> int:
    if earliest == 0:
        return 0
    # A sentence may begin earlier than the middle wants it to.
    lowest = max(0, start - int(spare * (1 - _WORD_SHARE)))
    sentences = [match.end() for match in _SENTENCE_START.finditer(text, lowest, start)]
    if lowest == 0:
        sentences.insert(0, 0)
    if sentences:
        return min(sentences, key=lambda place: abs(place - earliest))
    if text[earliest - 1].isspace():
        return earliest
    space = _SPACE.search(text, earliest, start)
    return space.end() if space else earliest


def _ending(text: str, end: int, latest: int, spare: int) -> int:
    if latest == len(text):
        return latest
    # One further on, since what parts two sentences may begin there; a full-width stop parts them behind it.
    places = (match.start() for match in _SENTENCE_START.finditer(text, end, latest + 1))
    sentences = [place for place in places if place <= latest]
    if sentences and latest - sentences[-1] <= spare * _SENTENCE_SHARE:
        return sentences[-1]
    if text[latest].isspace():
        return latest
    spaces = [match.start() for match in _SPACE.finditer(text, end, latest)]
    return spaces[-1] if spaces else latest
