"""
The queries that find a question's terms in one index, with scores as if all documents were in it.

Tantivy's IDF is that of the index it searches. Each term is boosted by the IDF over all documents divided by that one,
so that the scores of a shard's parts and of different shards compare.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import tantivy
from pyroaring import BitMap

from services.search.ports import LexicalMatch, LexicalStatistics
from services.search.shards.lexical.analysis import half_typed, is_single_character
from services.search.shards.lexical.engine import CHARACTERS, PRESENT, ROW, WORDS, schema

_MUST, _SHOULD = tantivy.Occur.Must, tantivy.Occur.Should
# What a document gets for a word that only begins like the question's last one: less than almost any whole word.
_PREFIX_SCORE = 1.0

# Up to this many allowed rows are given to Tantivy as a clause; more are sifted out of a longer list of hits. Of 50,000
# documents, ms as a clause / sifted: 64 rows 0.9 / 15, 500 rows 2.2 / 4.3, 1,000 rows 2.6 / 2.6, 5,000 rows 4.5 / 1.5.
_FEW_ROWS = 1000


def idf(documents: int, doc_freq: int) -> float:
    """Return Tantivy's inverse document frequency of a term that *doc_freq* of *documents* have."""
    doc_freq = min(doc_freq, documents)
    return math.log(1 + (documents - doc_freq + 0.5) / (doc_freq + 0.5))


@dataclass(frozen=True, slots=True)
class Question:
    """Terms in order, and what a document must have of them; see ShardQuery."""

    terms: Sequence[str]
    match: LexicalMatch
    prefix: bool
    language: str


class Part:
    """One index as of one commit: *rows* are what is to be found in it, *ballast* documents are not."""

    def __init__(self, searcher: tantivy.Searcher, rows: BitMap, ballast: int = 0) -> None:
        self.rows = rows
        self._searcher = searcher
        self._counted: int = searcher.doc_freq(PRESENT, 1)
        self.documents = self._counted - ballast

    def doc_freq(self, term: str) -> int:
        """Return how many of `documents` have *term*."""
        found: int = self._searcher.doc_freq(_field(term), term)
        return found

    def search(
        self, question: Question, limit: int, statistics: LexicalStatistics, allowed: BitMap
    ) -> list[tuple[int, float]]:
        """Return the rows of *allowed* that match and their scores, best first, as many as there are up to *limit*."""
        reachable = self.rows.intersection_cardinality(allowed)
        query = self._query(question, statistics) if reachable else None
        if query is None:
            return []
        if reachable <= _FEW_ROWS and reachable < len(self.rows):
            return self._hits(_restricted(query, self.rows & allowed), limit)
        fetch = math.ceil(limit * len(self.rows) / reachable)
        while True:
            hits = self._hits(query, fetch)
            kept = [hit for hit in hits if hit[0] in allowed]
            if len(kept) >= limit or len(hits) < fetch:
                return kept[:limit]
            fetch *= 2

    def matching(self, question: Question) -> BitMap:
        """Return all rows that match, dead ones too."""
        query = self._query(question, LexicalStatistics(self.documents, {})) if self.rows else None
        if query is None:
            return BitMap()
        # Ordered by a column Tantivy computes no scores, and gives the column's values at once.
        hits = self._searcher.search(query, len(self.rows), count=False, order_by_field=ROW).hits
        return BitMap([row for row, _ in hits])

    def _hits(self, query: tantivy.Query, limit: int) -> list[tuple[int, float]]:
        hits = self._searcher.search(query, min(limit, len(self.rows)), count=False).hits
        rows = self._searcher.fast_field_values(ROW, [address for _, address in hits])
        return [(row, score) for row, (score, _) in zip(rows, hits, strict=True)]

    def _query(self, question: Question, statistics: LexicalStatistics) -> tantivy.Query | None:
        """Return None when nothing matches."""
        terms = list(question.terms)
        if not terms:
            return None
        if question.match == "phrase" and len(terms) > 1:
            return self._phrase(question, statistics)
        occur = _SHOULD if question.match == "any" else _MUST
        unfinished = terms.pop() if question.prefix else None
        clauses = []
        for term, repeats in Counter(terms).items():
            clause = self._term(term, repeats, statistics)
            if clause is not None:
                clauses.append((occur, clause))
            elif occur == _MUST:
                return None
        if unfinished is not None:
            clauses.append((occur, self._unfinished(unfinished, question.language, statistics)))
        return tantivy.Query.boolean_query(clauses) if clauses else None

    def _term(self, term: str, repeats: int, statistics: LexicalStatistics) -> tantivy.Query | None:
        field = _field(term)
        local = self._searcher.doc_freq(field, term)
        if local == 0:
            return None
        boost = repeats * self._everywhere(term, statistics) / idf(self._counted, local)
        return tantivy.Query.boost_query(tantivy.Query.term_query(schema, field, term, "freq"), boost)

    def _unfinished(self, term: str, language: str, statistics: LexicalStatistics) -> tantivy.Query:
        """Return documents with any word that begins with *term*; those that have *term* itself rank as if it was whole."""
        started = tantivy.Query.regex_query(schema, WORDS, _started(term, language))
        clauses = [(_SHOULD, tantivy.Query.const_score_query(started, _PREFIX_SCORE))]
        whole = self._term(term, 1, statistics)
        if whole is not None:
            clauses.append((_SHOULD, whole))
        return tantivy.Query.boolean_query(clauses)

    def _phrase(self, question: Question, statistics: LexicalStatistics) -> tantivy.Query:
        terms = list(question.terms)
        local = sum(idf(self._counted, self._searcher.doc_freq(WORDS, term)) for term in terms)
        boost = sum(self._everywhere(term, statistics) for term in terms) / local
        whole = tantivy.Query.boost_query(tantivy.Query.phrase_query(schema, WORDS, terms), boost)
        # A single character stands in no pair of its own, but the next pair begins with it.
        if not question.prefix and not is_single_character(terms[-1]):
            return whole
        words = [*map(re.escape, terms[:-1]), _started(terms[-1], question.language)]
        started = tantivy.Query.regex_phrase_query(schema, WORDS, words)
        clauses = [(_MUST, tantivy.Query.const_score_query(started, _PREFIX_SCORE)), (_SHOULD, whole)]
        return tantivy.Query.boolean_query(clauses)

    def _everywhere(self, term: str, statistics: LexicalStatistics) -> float:
        return idf(statistics.documents, statistics.doc_freq.get(term, self.doc_freq(term)))


def _field(term: str) -> str:
    return CHARACTERS if is_single_character(term) else WORDS


def _started(term: str, language: str) -> str:
    shorter = sorted(half_typed(term, language))
    return "|".join([f"{re.escape(term)}.*", *map(re.escape, shorter)])


def _restricted(query: tantivy.Query, rows: BitMap) -> tantivy.Query:
    """Return *query* for *rows* alone, with the same scores."""
    only = tantivy.Query.const_score_query(tantivy.Query.term_set_query(schema, ROW, list(rows)), 0.0)
    return tantivy.Query.boolean_query([(_MUST, query), (_MUST, only)])
