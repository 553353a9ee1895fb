"""Chunks are short, complete and honest about where they come from."""

import sys
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tercet.ingest.chunking import Chunk, split, split_document
from tercet.ingest.structure import outline
from tercet.ingest.types import DocumentDict, TextFormat

FORMATS: list[TextFormat] = list(get_args(TextFormat))

GUIDE = """\
# Boat guide

Read this before you leave the harbour.

## Rigging

Hoist the mainsail first. Keep the bow to the wind while you do it.

```sh
# not a heading

pump --bilge --until-dry
```

## Mooring

### Lines

Two bow lines and two stern lines hold the boat.

### Fenders
"""

MANUAL = """\
==========
Bee manual
==========

Opening words.

Hives
-----

A hive needs shade in summer::

    place(hive)

    shade(hive)

Honey
-----

Harvest late.
"""

PAGE = """\
<html><head><title>Teapots | Shop</title><style>p {color: red}</style></head><body>
<h1>Teapots<a href="#top">¶</a></h1><p>Cast <b>iron</b> keeps<br>warm.</p><script>steal()</script>
<h2>Care</h2><ul><li>Rinse it</li><li>Dry it</li></ul><pre>pour()
    wait()</pre></body></html>
"""

# Text that looks like structure: the pieces that parsers of all the formats react to.
FRAGMENTS = [
    *("# One\n", "## Two\n\n", "Title\n=====\n", "---\n", "```\n", "    code\n", "\n\n", "a.b. ", "Stop! Go? ", "::\n"),
    *("<h2>H</h2>", "<p>par</p>", "<pre>x\n y</pre>", "<script>s</script>", "<", "&amp;", "- item\n", "| a | b |\n"),
    *("\r\n", "\u2028", "\x0b", "\x1c", "\t", "\u00a0", "é", "漢字。", "🦊", "word " * 5, "longword" * 6),
]
markup = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=20), max_size=30).map("".join)


def source_of(text: str, text_format: TextFormat) -> str:
    return outline(text, text_format).text


@example(text="#\n\nab", max_chars=1, text_format="markdown")  # a heading that leaves no room once never ended
@given(text=markup, max_chars=st.integers(1, 120), text_format=st.sampled_from(FORMATS))
def test_chunks_are_short_complete_and_at_their_offsets(text: str, max_chars: int, text_format: TextFormat) -> None:
    """Whatever the text, no chunk is too long, offsets are exact, and together they lose only white space."""
    source = source_of(text, text_format)
    position = 0
    for chunk in split(text, max_chars=max_chars, format=text_format):
        assert 0 < len(chunk.text) <= max_chars
        assert source[chunk.start : chunk.end] == chunk.text == chunk.text.strip()
        assert source[position : chunk.start].strip() == ""
        position = chunk.end
    assert source[position:].strip() == ""


@given(text=markup, text_format=st.sampled_from(["markdown", "rst", "plain"]))
def test_offsets_count_in_the_given_text(text: str, text_format: TextFormat) -> None:
    """Only HTML is extracted; every other format is its own source."""
    assert source_of(text, text_format) == text


def sections(chunks: list[Chunk]) -> list[tuple[str, ...]]:
    return [chunk.section for chunk in chunks]


def test_markdown_is_split_at_headings() -> None:
    """A heading begins a chunk; one without text of its own goes with the section below it."""
    chunks = split(GUIDE, max_chars=160, format="markdown")
    assert sections(chunks) == [
        ("Boat guide",),
        ("Boat guide", "Rigging"),
        ("Boat guide", "Mooring", "Lines"),
        ("Boat guide", "Mooring", "Fenders"),
    ]
    assert chunks[1].text.startswith("## Rigging\n\nHoist")
    assert chunks[2].text.startswith("## Mooring\n\n### Lines\n\nTwo bow")


def test_code_is_kept_whole() -> None:
    """A fenced block that fits is not cut at its blank line, and a comment in it is no heading."""
    chunks = split(GUIDE, max_chars=80, format="markdown")
    assert sum("```sh\n# not a heading\n\npump --bilge --until-dry\n```" in chunk.text for chunk in chunks) == 1


def test_front_matter_is_no_heading() -> None:
    """The lines between --- at the top of a Markdown file give the title and are not taken for a heading."""
    found = outline("---\ntitle: 'Kites'\ntags: x\n---\n\nFly them.\n", "markdown")
    assert found.title == "Kites"
    assert {block.section for block in found.blocks} == {()}


def test_rst_is_split_at_underlined_titles() -> None:
    """Levels follow the order in which underlines appear, and a literal block stays with the line before it."""
    chunks = split(MANUAL, max_chars=100, format="rst")
    assert sections(chunks) == [("Bee manual",), ("Bee manual", "Hives"), ("Bee manual", "Honey")]
    assert chunks[1].text.endswith("summer::\n\n    place(hive)\n\n    shade(hive)")


def test_html_is_read_as_a_person_would() -> None:
    """Scripts, styles and the head are dropped, inline tags vanish, and preformatted lines keep their indent."""
    found = outline(PAGE, "html")
    assert found.title == "Teapots"
    assert found.text == "Teapots¶\n\nCast iron keeps\nwarm.\n\nCare\n\nRinse it\nDry it\n\npour()\n    wait()"
    chunks = split(PAGE, max_chars=45, format="html")
    assert sections(chunks) == [("Teapots",), ("Teapots", "Care")]


def test_deep_html_is_read() -> None:
    """A page nested deeper than Python recurses is read like any other."""
    depth = sys.getrecursionlimit() * 2
    assert [chunk.text for chunk in split("<div>" * depth + "pearl", max_chars=10, format="html")] == ["pearl"]


def test_prose_is_cut_at_paragraphs_then_sentences_then_words() -> None:
    """Each coarser boundary is used as long as what it gives is short enough."""
    text = "Short one.\n\nFirst sentence here. Second sentence here.\n\nnine words without any stop in them at all"
    chunks = [chunk.text for chunk in split(text, max_chars=24, format="plain")]
    assert chunks == [
        "Short one.",
        "First sentence here.",
        "Second sentence here.",
        "nine words without any",
        "stop in them at all",
    ]


def test_neighbours_are_packed() -> None:
    """Paragraphs under one heading share a chunk for as long as they fit."""
    text = "\n\n".join(["one fish", "two fish", "red fish", "blue fish"])
    assert [chunk.text for chunk in split(text, max_chars=20, format="plain")] == [
        "one fish\n\ntwo fish",
        "red fish\n\nblue fish",
    ]


def test_a_text_that_fits_is_one_chunk() -> None:
    """Structure does not matter when there is nothing to cut; a blank text has no chunk at all."""
    assert split(f"\n{GUIDE}\n", max_chars=1000, format="markdown") == [
        Chunk(GUIDE.strip(), 1, 1 + len(GUIDE.strip()), ())
    ]
    assert split(" \n\t", max_chars=5, format="plain") == []


def test_a_limit_below_one_is_refused() -> None:
    """A chunk has to hold something."""
    with pytest.raises(ValueError, match="at least 1"):
        split("x", max_chars=0, format="plain")


def test_split_document_names_its_chunks() -> None:
    """Chunks carry the document's id, their number, offsets and heading path; the title is not said twice."""
    document = DocumentDict(id="boat", text=GUIDE, title="Boat guide", metadata={"lang": "en"})
    chunks = list(split_document(document, max_chars=160, format="markdown"))
    assert [chunk["id"] for chunk in chunks] == ["boat#0", "boat#1", "boat#2", "boat#3"]
    assert [chunk["title"] for chunk in chunks[:2]] == ["Boat guide", "Boat guide > Rigging"]
    start = GUIDE.index("## Rigging")
    assert chunks[1]["metadata"] == {
        "lang": "en",
        "document": "boat",
        "chunk": 1,
        "chunks": 4,
        "start": start,
        "end": start + len(chunks[1]["text"]),
        "section": "Boat guide > Rigging",
    }


def test_split_document_keeps_what_fits_and_what_has_a_vector() -> None:
    """A caller's vector speaks for the whole text, so such a document is never cut."""
    short = DocumentDict(id="a", text="brief", metadata={})
    vectored = DocumentDict(id="b", text="word " * 100, metadata={}, vector=[1.0])
    assert list(split_document(short, max_chars=10)) == [short]
    assert list(split_document(vectored, max_chars=10)) == [vectored]
