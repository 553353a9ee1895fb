"""
The Tantivy indexes that a lexical index has: their fields, and how a document is written into one.

A document is one field: its title twice and its text once. One field, because a term then has one document frequency,
and twice, because that ranks best. Stop words stay in: BM25 makes little of them, and a question that has nothing else
is still answered. (nDCG@10, title once / twice / twice without stop words: SciFact .684 / .690 / .690, Cranfield
.504 / .516 / .516, WikiQA .620 / .625 / .598, MedQuAD .581 / .605 / .605.)

Word positions cost little time and much disk: 100,000 documents of 60 words are indexed in 2.9 s and 13.5 MB on the
disk, without positions in 2.8 s and 7.9 MB. A field of unstemmed words besides, for prefixes, would make that 4.2 s and
20 MB; see `analysis.half_typed` for what does instead.

What is not obvious about Tantivy:
* An index in memory commits in 2 ms while its writer is kept, in 9 ms with a new one; a writer has six threads.
* Its reader must reload by hand: a reader that follows commits makes every reload wait for 100 ms.
* Documents that were deleted count in its N and document frequencies until their segment is merged. `PRESENT` is a
  term of every document, so its document frequency is exactly that N.
* Deleting by the term of an unsigned field with a Python int silently deletes nothing; deleting by a query works.
* A document with a value of the wrong type kills the writer for good.
* Segment files are written once and synced; meta.json and .managed.json are replaced by renaming. So hard links to all
  of them never change. What is not in .managed.json is never deleted.
* Files that a living searcher of the same Index object has open are not deleted, whatever is committed.
"""

from dataclasses import dataclass
from pathlib import Path

import tantivy

from services.search.shards.lexical.analysis import analyzer, respelled, single_characters

WORDS = "words"
CHARACTERS = "characters"
ROW = "row"
PRESENT = "present"
META, MANAGED = "meta.json", ".managed.json"

_ANALYZER = "tercet"
_SPLITTER = "tercet-characters"
_TITLE_WEIGHT = 2
# A letter of Tangut, in the one document that makes up for the length of all other ballast.
_BALLAST = "\U00017000 "

schema = (
    tantivy.SchemaBuilder()
    .add_text_field(WORDS, tokenizer_name=_ANALYZER, index_option="position")
    .add_text_field(CHARACTERS, tokenizer_name=_SPLITTER, index_option="freq")
    .add_unsigned_field(ROW, indexed=True, fast=True)
    .add_unsigned_field(PRESENT, indexed=True)
    .build()
)


@dataclass(frozen=True, slots=True)
class MeanLength:
    """How many terms so many documents had together, of which the average length is known."""

    terms: int = 0
    documents: int = 0

    def __add__(self, other: "MeanLength") -> "MeanLength":
        """Return the average of both sets together."""
        return MeanLength(self.terms + other.terms, self.documents + other.documents)


def open_index(language: str, directory: Path | None = None) -> tantivy.Index:
    """Return the index in *directory*, a new one where there is none, or a new one in memory."""
    index = tantivy.Index(schema) if directory is None else tantivy.Index(schema, str(directory))
    index.register_tokenizer(_ANALYZER, analyzer(language))
    index.register_tokenizer(_SPLITTER, tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())
    index.config_reader("manual")
    return index


def document_of(row: int, title: str | None, text: str) -> tantivy.Document:
    """Return what is indexed of a document."""
    document = tantivy.Document()
    document.add_unsigned(ROW, row)
    document.add_unsigned(PRESENT, 1)
    if title:
        spelled = respelled(title)
        for _ in range(_TITLE_WEIGHT):
            document.add_text(WORDS, spelled)
    document.add_text(WORDS, respelled(text))
    characters = single_characters(f"{title} {text}" if title else text)
    if characters:
        document.add_text(CHARACTERS, " ".join(characters))
    return document


def term_count(title: str | None, text: str, language: str) -> int:
    """Return how many terms `document_of` indexes a document by."""
    analyze = analyzer(language).analyze
    return _TITLE_WEIGHT * len(analyze(respelled(title or ""))) + len(analyze(respelled(text)))


def add_ballast(writer: tantivy.IndexWriter, documents: int, length: MeanLength) -> None:
    """
    Add *documents* that nothing finds and that are of *length* on average.

    BM25 compares a document's length with the average of its own index. That of a few documents is anything; with enough
    ballast it is that of the index which the ballast was weighed by, and the scores of both compare.
    """
    for number in range(documents):
        document = tantivy.Document()
        document.add_unsigned(PRESENT, 1)
        if number == 0:
            document.add_text(WORDS, _BALLAST * round(documents * length.terms / length.documents))
        writer.add_document(document)
