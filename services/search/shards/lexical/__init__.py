"""Lexical retrieval over one shard: BM25 by Tantivy, a disk index for the bulk and one in memory for the newest."""

from services.search.shards.lexical.analysis import LANGUAGES, analyze, question_terms
from services.search.shards.lexical.highlight import TantivyHighlighter
from services.search.shards.lexical.index import Built, Job, LexicalIndex
from services.search.shards.lexical.scoring import idf
from services.search.shards.lexical.view import LexicalView

__all__ = [
    "LANGUAGES",
    "Built",
    "Job",
    "LexicalIndex",
    "LexicalView",
    "TantivyHighlighter",
    "analyze",
    "idf",
    "question_terms",
]
