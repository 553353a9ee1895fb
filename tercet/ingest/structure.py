"""The structure of a text, whatever its format: blocks of prose and code under nested headings."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from tercet.ingest.types import TextFormat

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

Kind = Literal["heading", "prose", "code"]

_NEWLINE = re.compile(r"\r\n?|\n")
_RST_UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1*\s*")
_RST_CODE = re.compile(r"\s*\.\. +(?:code|code-block|sourcecode|parsed-literal|math|doctest)::")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_MATTER_TITLE = re.compile(r"^title:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_HTML_DROPPED = frozenset({"head", "script", "style", "template", "noscript", "svg", "iframe", "object", "-comment"})
_HTML_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_HTML_INLINE = re.compile(
    r"a|abbr|b|bdi|bdo|big|button|cite|code|data|del|dfn|em|font|i|img|input|ins|kbd|label|mark|q|s|samp|small|span"
    r"|strike|strong|sub|sup|time|tt|u|var|wbr"
)


@dataclass(frozen=True, slots=True)
class Block:
    """The range *start* to *end* of a text, blank at neither end, and the headings it stands under."""

    kind: Kind
    start: int
    end: int
    section: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """
    A text with its blocks in order, which together cover all that is not white space.

    *text* is what offsets count in: the source itself, or for HTML the text extracted from it.
    """

    text: str
    title: str | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place where a block begins; *level* is a heading's depth, or 0."""

    start: int
    kind: Kind
    level: int = 0
    label: str = ""


def outline(text: str, text_format: TextFormat) -> Outline:
    """Find the title, headings and blocks of *text*."""
    match text_format:
        case "markdown":
            return _outline_markdown(text)
        case "rst":
            return _assemble(text, _mark_rst(text))
        case "html":
            return _outline_html(text)
        case "plain":
            return _assemble(text, [])


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Narrow a range of *text* until it neither begins nor ends with white space (an empty range if all of it is)."""
    while start < end and text[end - 1].isspace():
        end -= 1
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _assemble(text: str, marks: Iterable[_Mark], title: str | None = None) -> Outline:
    """Turn *marks* in order into blocks: each lasts until the next, so nothing between two can be lost."""
    marks = [_Mark(0, "prose"), *marks, _Mark(len(text), "prose")]
    blocks: list[Block] = []
    path: list[tuple[int, str]] = []
    for mark, following in pairwise(marks):
        if mark.kind == "heading":
            path = [entry for entry in path if entry[0] < mark.level]
            if mark.label:
                path.append((mark.level, mark.label))
                title = title or mark.label
        start, end = trim(text, mark.start, following.start)
        if start < end:
            blocks.append(Block(mark.kind, start, end, tuple(label for _, label in path)))
    return Outline(text, title, tuple(blocks))


def _line_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in _NEWLINE.finditer(text)), len(text)]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _outline_markdown(text: str) -> Outline:
    front_matter = _FRONT_MATTER.match(text)
    if front_matter is None:
        return _assemble(text, _mark_markdown(text, 0))
    found = _FRONT_MATTER_TITLE.search(front_matter.group(1) or "")
    title = found.group(1).strip("\"'") if found else None
    end = front_matter.end()
    return _assemble(text, [_Mark(end, "prose"), *_mark_markdown(text[end:], end)], title or None)


def _mark_markdown(text: str, offset: int) -> Iterator[_Mark]:
    from markdown_it import MarkdownIt

    starts = [offset + start for start in _line_starts(text)]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.level != 0 or token.map is None:
            continue
        first, last = token.map
        if token.type == "heading_open":
            inline = tokens[number + 1].children or []
            words = "".join(" " if child.type.endswith("break") else child.content for child in inline)
            yield _Mark(starts[first], "heading", int(token.tag[1]), _squeeze(words))
            yield _Mark(starts[last], "prose")
        else:
            code = token.type in ("fence", "code_block", "table_open")
            yield _Mark(starts[first], "code" if code else "prose")


def _mark_rst(text: str) -> Iterator[_Mark]:
    starts = _line_starts(text)
    lines = [text[a:b].rstrip().expandtabs() for a, b in pairwise(starts)]
    styles: list[tuple[str, bool]] = []
    at = 0
    while at < len(lines):
        if heading := _rst_heading(lines, at):
            label, style, height = heading
            if style not in styles:
                styles.append(style)
            yield _Mark(starts[at], "heading", styles.index(style) + 1, label)
            yield _Mark(starts[at + height], "prose")
            at += height
        elif lines[at].endswith("::") or _RST_CODE.match(lines[at]):
            end = _rst_literal_end(lines, at)
            # The introducing line stays with its code: alone it says nothing.
            yield _Mark(starts[at], "code" if end > at + 1 else "prose")
            yield _Mark(starts[end], "prose")
            at = end
        else:
            at += 1


def _rst_heading(lines: list[str], at: int) -> tuple[str, tuple[str, bool], int] | None:
    """The label, style (character, overlined) and height in lines of a section title that begins at line *at*."""
    if at and lines[at - 1].strip():
        return None
    rows = [*lines[at : at + 3], "", "", ""]
    if _RST_UNDERLINE.fullmatch(rows[0]):
        overlined = rows[1].strip() and rows[2] == rows[0] and len(rows[0]) >= len(rows[1].strip())
        return (_squeeze(rows[1]), (rows[0][0], True), 3) if overlined else None
    underlined = rows[0] and not rows[0][0].isspace() and _RST_UNDERLINE.fullmatch(rows[1])
    if underlined and len(rows[1]) >= len(rows[0]) and len(rows[1]) > 1:
        return _squeeze(rows[0]), (rows[1][0], False), 2
    return None


def _rst_literal_end(lines: list[str], at: int) -> int:
    """The line after the indented block that line *at* introduces."""

    def indent(line: str) -> int:
        return len(line) - len(line.lstrip())

    end = at + 1
    for number in range(at + 1, len(lines)):
        if not lines[number]:
            continue
        if indent(lines[number]) <= indent(lines[at]):
            break
        end = number + 1
    return end


class _HtmlText:
    """Collects the visible text of a page; lines and paragraphs are those that a reader would see."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []
        self._parts: list[str] = []
        self._length = 0
        self._gap = ""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def breaks(self, gap: str) -> None:
        """Ask for *gap* before the next text; the widest gap asked for wins."""
        if len(gap) > len(self._gap) or (gap == "\n" and self._gap == " "):
            self._gap = gap

    def mark(self, kind: Kind, level: int = 0, label: str = "") -> None:
        self.marks.append(_Mark(self._length, kind, level, label))

    def add(self, text: str, *, preformatted: bool) -> None:
        if not preformatted:
            if text[:1].isspace():
                self.breaks(" ")
            squeezed = _squeeze(text)
            if squeezed:
                self._write(squeezed)
            if text[-1:].isspace():
                self.breaks(" ")
        elif text:
            self._write(text)

    def _write(self, text: str) -> None:
        for part in (self._gap if self._length else "", text):
            self._parts.append(part)
            self._length += len(part)
        self._gap = ""


def _outline_html(source: str) -> Outline:
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(source)
    collected = _HtmlText()
    if tree.body is not None:
        _collect_html(tree.body, collected)
    titles = [tree.css_first("body h1"), tree.css_first("head > title")]
    title = next((found for node in titles if node is not None and (found := _label(node))), None)
    return _assemble(collected.text, collected.marks, title)


def _collect_html(body: "LexborNode", collected: _HtmlText) -> None:
    # A stack of our own, because pages may be nested deeper than Python recurses. The flag says "on the way out".
    stack: list[tuple[LexborNode, bool, bool]] = [(body, False, False)]
    while stack:
        node, preformatted, leaving = stack.pop()
        tag = node.tag or ""
        if tag == "-text":
            collected.add(node.text(deep=False), preformatted=preformatted)
            continue
        if tag in _HTML_DROPPED:
            continue
        if leaving:
            _leave_html(tag, collected)
            continue
        _enter_html(node, tag, collected)
        stack.append((node, preformatted, True))
        child = node.last_child
        while child is not None:
            stack.append((child, preformatted or tag == "pre", False))
            child = child.prev


def _label(node: "LexborNode") -> str:
    # The pilcrow is the link to a heading that documentation generators put into it.
    return _squeeze(node.text()).rstrip("¶ ")


def _gap_of(tag: str) -> str:
    if tag in ("td", "th"):
        return " "
    return "\n" if tag in ("br", "li", "tr", "dt", "dd", "option", "div") else "\n\n"


def _enter_html(node: "LexborNode", tag: str, collected: _HtmlText) -> None:
    if _HTML_INLINE.fullmatch(tag):
        return
    collected.breaks(_gap_of(tag))
    if tag in _HTML_HEADINGS:
        collected.mark("heading", _HTML_HEADINGS[tag], _label(node))
    elif tag in ("pre", "table"):
        collected.mark("code")


def _leave_html(tag: str, collected: _HtmlText) -> None:
    if _HTML_INLINE.fullmatch(tag):
        return
    collected.breaks(_gap_of(tag))
    if tag in _HTML_HEADINGS or tag in ("pre", "table"):
        collected.mark("prose")
