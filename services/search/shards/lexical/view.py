"""What searches see of a lexical index."""

from collections.abc import Iterable, Sequence

from pyroaring import BitMap

from services.search.ports import LexicalMatch, LexicalStatistics
from services.search.shards.lexical.scoring import Part, Question


class LexicalView:
    """The documents as of one commit, in one or several indexes. It never changes; any number of threads may use it."""

    def __init__(self, parts: Iterable[Part], language: str) -> None:
        self._parts = [part for part in parts if part.documents]
        self._language = language

    @property
    def num_docs(self) -> int:
        """How many documents BM25 counts: the live ones, and some that were deleted lately."""
        return sum(part.documents for part in self._parts)

    def doc_freq(self, terms: Sequence[str]) -> dict[str, int]:
        """Return in how many of `num_docs` documents each of *terms* occurs."""
        return {term: sum(part.doc_freq(term) for part in self._parts) for term in set(terms)}

    def search(
        self,
        terms: Sequence[str],
        limit: int,
        *,
        statistics: LexicalStatistics | None = None,
        allowed: BitMap,
        match: LexicalMatch = "any",
        prefix: bool = False,
    ) -> list[tuple[int, float]]:
        """
        Return the rows of *allowed* that match *terms* and their BM25 scores, best first, as many as there are up to *limit*.

        A document matches with any of *terms*, with all of them, or with all of them as a phrase. With *prefix* the last
        of them also stands for any word that begins with it, or that it may be the beginning of (see `half_typed`); such
        a word scores 1 whatever it is, on top of the BM25 score where the term itself occurs. A term that is repeated
        counts as often. With *statistics* the scores are as if all the documents they count were in this view.
        """
        if limit < 1 or not terms or not allowed:
            return []
        counted = statistics or LexicalStatistics(self.num_docs, self.doc_freq(terms))
        question = Question(terms, match, prefix, self._language)
        hits = [hit for part in self._parts for hit in part.search(question, limit, counted, allowed)]
        hits.sort(key=lambda hit: (-hit[1], hit[0]))
        return hits[:limit]

    def matching(self, terms: Sequence[str], match: LexicalMatch, prefix: bool) -> BitMap:
        """Return all rows that match, as `search` has it; rows that were deleted lately may be among them."""
        question = Question(terms, match, prefix, self._language)
        return BitMap.union(BitMap(), *(part.matching(question) for part in self._parts))
