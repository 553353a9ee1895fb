"""Long texts are cut where their structure allows: at headings, paragraphs, sentences and only then words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from tercet.ingest.structure import Block, Outline, outline, trim
from tercet.ingest.types import DocumentDict, TextFormat

# About what 256 tokens of English hold, which is all that the default model reads of a text.
DEFAULT_MAX_CHUNK_CHARS = 1000

_BLANK_LINE = r"\n[^\S\n]*(?=\n)"
_LIST_ITEM = r"\n(?=[^\S\n]*(?:[-*+•]|\d{1,3}[.)])[^\S\n])"
_SEPARATORS = {
    "prose": [
        re.compile(rf"{_BLANK_LINE}|{_LIST_ITEM}"),
        re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])\s*"),
        re.compile(r"\s+"),
    ],
    "code": [re.compile(_BLANK_LINE), re.compile(r"\n"), re.compile(r"\s+")],
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a text: *text* is exactly ``source[start:end]``, and *section* the headings above it, outermost first."""

    text: str
    start: int
    end: int
    section: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    section: tuple[str, ...]
    is_heading: bool = False


def split(text: str, *, max_chars: int, format: TextFormat) -> list[Chunk]:
    """
    Cut *text* into chunks of at most *max_chars* characters, in order, that cover all that is not white space.

    A text that fits is one chunk without a section. Offsets count in *text*; for HTML they count in the text
    extracted from it, which is ``outline(text, "html").text``. A blank text has no chunks.
    """
    return split_outline(outline(text, format), max_chars=max_chars)


def split_outline(document: Outline, *, max_chars: int) -> list[Chunk]:
    """Do what *split* does for a text whose structure is known already."""
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, not {max_chars}")
    text = document.text
    start, end = trim(text, 0, len(text))
    if start == end:
        return []
    if end - start <= max_chars:
        return [Chunk(text[start:end], start, end, ())]
    spans = _join_bare_headings(_pack(_cut_blocks(document, max_chars), max_chars), max_chars)
    return [Chunk(text[span.start : span.end], span.start, span.end, span.section) for span in spans]


def split_document(
    document: DocumentDict, *, max_chars: int, format: TextFormat = "plain", structure: Outline | None = None
) -> Iterator[DocumentDict]:
    """
    Yield *document* itself if its text fits, else its chunks as documents named ``<id>#<n>``.

    A chunk's metadata adds document, chunk, chunks, start, end and (under a heading) section. A document with a
    vector of its own is never cut: the vector speaks for the whole text. *structure* saves finding it again.
    """
    chunks = split_outline(structure or outline(document["text"], format), max_chars=max_chars)
    if "vector" in document or len(document["text"]) <= max_chars or not chunks:
        yield document
        return
    if len(chunks) == 1:
        yield {**document, "text": chunks[0].text}
        return
    title = document.get("title")
    for number, chunk in enumerate(chunks):
        piece = DocumentDict(id=f"{document['id']}#{number}", text=chunk.text, metadata=dict(document["metadata"]))
        piece["metadata"] |= {
            "document": document["id"],
            "chunk": number,
            "chunks": len(chunks),
            "start": chunk.start,
            "end": chunk.end,
        }
        if chunk.section:
            piece["metadata"]["section"] = " > ".join(chunk.section)
        # The first heading is usually the title itself, which should not be said twice.
        path = chunk.section[1:] if chunk.section[:1] == (title,) else chunk.section
        if title or path:
            piece["title"] = " > ".join([title, *path] if title else path)
        yield piece


def _cut_blocks(document: Outline, max_chars: int) -> Iterator[_Span]:
    room = max_chars
    for block in document.blocks:
        if block.kind == "heading" and block.end - block.start <= max_chars:
            yield _Span(block.start, block.end, block.section, is_heading=True)
            # What follows is cut a little shorter, so that a heading is not parted from its text.
            room = max(max_chars - (block.end - block.start) - 2, max_chars // 2, 1)
            continue
        whole = block.kind == "code" and block.end - block.start <= max_chars
        yield from _cut(document.text, block, max_chars if whole else room)
        room = max_chars


def _cut(text: str, block: Block, limit: int) -> Iterator[_Span]:
    separators = _SEPARATORS["code" if block.kind == "code" else "prose"]
    # Depth first with a stack; each entry says at which separator to go on.
    stack = [(block.start, block.end, 0)]
    while stack:
        start, end, level = stack.pop()
        start, end = trim(text, start, end)
        if start == end:
            continue
        if end - start <= limit:
            yield _Span(start, end, block.section)
        elif level == len(separators):
            stack.append((start + limit, end, level))
            yield _Span(*trim(text, start, start + limit), block.section)
        else:
            edges = [start, *(match.end() for match in separators[level].finditer(text, start, end)), end]
            stack.extend((a, b, level + 1) for a, b in reversed(list(pairwise(edges))))


def _pack(spans: Iterator[_Span], max_chars: int) -> Iterator[_Span]:
    """Join neighbours under the same heading for as long as they fit."""
    packed: _Span | None = None
    for span in spans:
        joins = packed is not None and not span.is_heading and packed.section == span.section
        if packed is not None and joins and span.end - packed.start <= max_chars:
            packed = _Span(packed.start, span.end, packed.section)
            continue
        if packed is not None:
            yield packed
        packed = span
    if packed is not None:
        yield packed


def _join_bare_headings(spans: Iterator[_Span], max_chars: int) -> Iterator[_Span]:
    """Put a heading that has no text of its own before the section that follows, where there is room."""
    bare: _Span | None = None
    for span in spans:
        if bare is not None and span.end - bare.start <= max_chars:
            span = _Span(bare.start, span.end, span.section, span.is_heading)
        elif bare is not None:
            yield bare
        bare = span if span.is_heading else None
        if bare is None:
            yield span
    if bare is not None:
        yield bare
