"""
Lexical retrieval over one shard: BM25 by Tantivy, in memory.

A document is one field: its title twice and its text once. One field, because a term then has one document frequency,
and twice, because that ranks best. Stop words stay in: BM25 makes little of them, and a question that has nothing else
is still answered. (nDCG@10, title once / twice / twice without stop words: SciFact .684 / .690 / .690, Cranfield
.504 / .516 / .516, WikiQA .620 / .625 / .598, MedQuAD .581 / .605 / .605.)

Tantivy's IDF is that of the shard. Each term is boosted by the IDF over all shards divided by the shard's own, so that
scores of different shards compare.

What is not obvious about Tantivy:
* An index in memory commits in a few milliseconds. Its reader must reload by hand: a reader that follows commits makes
  every reload wait for 100 ms.
* Documents that were deleted count in its N and document frequencies until their segment is merged. `_PRESENT` is a
  term of every document, so its document frequency is exactly that N.
* Deleting by the term of an unsigned field with a Python int silently deletes nothing; deleting by a query works.
* A document with a value of the wrong type kills the writer for good.
"""

import math
from collections import Counter
from collections.abc import Sequence

import tantivy
from pyroaring import BitMap

from services.common.errors import BackendFailed
from services.search.ports import LexicalStatistics

_WORDS = "words"
_ROW = "row"
_PRESENT = "present"
_ANALYZER = "tercet"
_MAX_TERM_CHARS = 64
_TITLE_WEIGHT = 2
_WRITER_HEAP_BYTES = 15_000_000

# Up to this many allowed rows are given to Tantivy as a clause; more are sifted out of a longer list of hits. Of 50,000
# documents, ms as a clause / sifted: 64 rows 0.9 / 15, 500 rows 2.2 / 4.3, 1,000 rows 2.6 / 2.6, 5,000 rows 4.5 / 1.5.
_FEW_ROWS = 1000


def _build_analyzer() -> tantivy.TextAnalyzer:
    return (
        tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        .filter(tantivy.Filter.remove_long(_MAX_TERM_CHARS))
        .filter(tantivy.Filter.lowercase())
        .filter(tantivy.Filter.ascii_fold())
        .filter(tantivy.Filter.stemmer("english"))
        .build()
    )


def _build_schema() -> tantivy.Schema:
    return (
        tantivy.SchemaBuilder()
        .add_text_field(_WORDS, tokenizer_name=_ANALYZER, index_option="freq")
        .add_unsigned_field(_ROW, indexed=True, fast=True)
        .add_unsigned_field(_PRESENT, indexed=True)
        .build()
    )


_analyzer = _build_analyzer()
_schema = _build_schema()


def analyze(text: str) -> list[str]:
    """Return the terms of *text* in order, repeated as often as they occur: exactly what a document is indexed by."""
    terms: list[str] = _analyzer.analyze(text)
    return terms


def idf(documents: int, doc_freq: int) -> float:
    """Return Tantivy's inverse document frequency of a term that *doc_freq* of *documents* have."""
    doc_freq = min(doc_freq, documents)
    return math.log(1 + (documents - doc_freq + 0.5) / (doc_freq + 0.5))


class LexicalIndex:
    """
    What is written: changes gather until `commit` returns a view that has them. For one thread at a time.

    Every method raises BackendFailed when Tantivy's writer fails; what was not committed is then lost, and the next
    call begins with a new writer.
    """

    def __init__(self) -> None:
        self._index = tantivy.Index(_schema)
        self._index.register_tokenizer(_ANALYZER, _build_analyzer())
        self._index.config_reader("manual")
        self._writer: tantivy.IndexWriter | None = None

    def add(self, row: int, title: str | None, text: str) -> None:
        """Add a document under *row*, which is new."""
        document = tantivy.Document()
        document.add_unsigned(_ROW, row)
        document.add_unsigned(_PRESENT, 1)
        for _ in range(_TITLE_WEIGHT if title else 0):
            document.add_text(_WORDS, title)
        document.add_text(_WORDS, text)
        self._write("add_document", document)

    def remove(self, row: int) -> None:
        """Remove the document under *row*, if there is one."""
        self._write("delete_documents_by_query", tantivy.Query.term_query(_schema, _ROW, row))

    def commit(self) -> "LexicalView":
        """Return a view of all documents as they now are; views that exist do not change."""
        if self._writer is not None:
            self._write("commit")
            self._index.reload()
        return LexicalView(self._index.searcher())

    def rollback(self) -> None:
        """Forget what was not committed."""
        if self._writer is not None:
            self._write("rollback")

    def _write(self, method: str, *arguments: object) -> None:
        try:
            if self._writer is None:
                # Made when it is first needed: it has a thread and a heap, and many shards are empty.
                self._writer = self._index.writer(heap_size=_WRITER_HEAP_BYTES, num_threads=1)
            getattr(self._writer, method)(*arguments)
        except Exception as error:
            self._writer = None
            raise BackendFailed(f"The lexical index could not be written: {error}") from error


class LexicalView:
    """What is read: the documents as of one commit. It never changes; any number of threads may use it."""

    def __init__(self, searcher: tantivy.Searcher) -> None:
        self._searcher = searcher
        self._documents: int = searcher.doc_freq(_PRESENT, 1)

    @property
    def num_docs(self) -> int:
        """How many documents BM25 counts: the live ones, and some that were deleted lately."""
        return self._documents

    def doc_freq(self, terms: Sequence[str]) -> dict[str, int]:
        """Return in how many of `num_docs` documents each of *terms* occurs."""
        return {term: self._searcher.doc_freq(_WORDS, term) for term in set(terms)}

    def search(
        self,
        terms: Sequence[str],
        limit: int,
        *,
        statistics: LexicalStatistics | None = None,
        allowed: BitMap | None = None,
    ) -> list[tuple[int, float]]:
        """
        Return the rows that have any of *terms* and their BM25 scores, best first, at most *limit*.

        With *statistics* the scores are as if all the documents they count were in this view. Only rows of *allowed*
        are returned; as many as there are, up to *limit*.
        """
        query = self._query(terms, statistics)
        if query is None or limit < 1 or (allowed is not None and not allowed):
            return []
        if allowed is None:
            return self._hits(query, limit)
        if len(allowed) <= _FEW_ROWS:
            return self._hits(_restricted(query, allowed), limit)
        fetch = math.ceil(limit * max(1, self._documents / len(allowed)))
        while True:
            hits = self._hits(query, fetch)
            kept = [hit for hit in hits if hit[0] in allowed]
            if len(kept) >= limit or len(hits) < fetch:
                return kept[:limit]
            fetch *= 2

    def _hits(self, query: tantivy.Query, limit: int) -> list[tuple[int, float]]:
        hits = self._searcher.search(query, min(limit, self._documents), count=False).hits
        rows = self._searcher.fast_field_values(_ROW, [address for _, address in hits])
        return [(row, score) for row, (score, _) in zip(rows, hits, strict=True)]

    def _query(self, terms: Sequence[str], statistics: LexicalStatistics | None) -> tantivy.Query | None:
        """Return any-of-*terms*, each weighted by how often it is repeated; None when no document has any."""
        clauses = []
        for term, repeats in Counter(terms).items():
            local = self._searcher.doc_freq(_WORDS, term)
            if local == 0:
                continue
            boost = float(repeats)
            if statistics is not None:
                everywhere = idf(statistics.documents, statistics.doc_freq.get(term, local))
                boost *= everywhere / idf(self._documents, local)
            query = tantivy.Query.term_query(_schema, _WORDS, term, "freq")
            clauses.append((tantivy.Occur.Should, tantivy.Query.boost_query(query, boost)))
        return tantivy.Query.boolean_query(clauses) if clauses else None


def _restricted(query: tantivy.Query, rows: BitMap) -> tantivy.Query:
    """Return *query* for *rows* alone, with the same scores."""
    only = tantivy.Query.const_score_query(tantivy.Query.term_set_query(_schema, _ROW, list(rows)), 0.0)
    return tantivy.Query.boolean_query([(tantivy.Occur.Must, query), (tantivy.Occur.Must, only)])
