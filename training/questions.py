"""
Questions cut from passages, so that text without questions can be trained on.

Three kinds: the title (asked of the text without it), a sentence (asked of the rest of its passage), and two to five of
the rarest words of a sentence, as people type them.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

from training.data import Collection, Kind, Passage, Question

# How many questions are made for each passage of a set, on average; the rest of a set's share are its real ones.
PER_PASSAGE = {"squad_dev": 0.9, "medquad": 0.3, "scifact": 0.75, "pubmedqa_l": 1.0, "python_docs": 0.9}
_DEFAULT_PER_PASSAGE = 1.0
_MAX_CHARS = 300
_MIN_CHARS = 8
_SENTENCE_WORDS = range(5, 41)
_MIN_SENTENCES = 3
_MAX_TITLE_WORDS = 30
_STOP_WORDS = """
a an the of in on at to for and or is are was were be been by with from as that this these those it its which who
whom what when where how why not no but if than then so such may can could will would should has have had do does
did into over under between among also more most other some any all each both few many much very s t about his
her their they we you i he she our your them there here out up
"""
_STOP = frozenset(_STOP_WORDS.split())
_WORD = re.compile(r"[A-Za-z0-9_-]+")


def made_questions(collection: Collection) -> list[Question]:
    """Return questions cut from the passages that are not closed: the same each time for the same collection."""
    rng = random.Random(f"questions/{collection.name}")
    rare = _Rarity([passage.whole for passage in collection.passages])
    titles = Counter(passage.title for passage in collection.passages)
    share = PER_PASSAGE.get(collection.name, _DEFAULT_PER_PASSAGE)
    made = []
    for at, passage in enumerate(collection.passages):
        count = int(share) + (rng.random() < share % 1)
        if at in collection.closed or not count:
            continue
        kinds = _kinds(passage, unique_title=titles[passage.title] == 1)
        for kind in rng.sample(kinds, min(count, len(kinds))):
            text = _cut(passage, kind, rare, rng)[:_MAX_CHARS].strip()
            if len(text) >= _MIN_CHARS:
                made.append(Question(text, (at,), kind, "train"))
    return made


def shown(passage: Passage, question: Question) -> str:
    """
    Return what the student sees of *passage*, any of the candidates of *question*, so that nothing gives it away.

    The sentence that the question was cut from is taken out; where it was a title, no candidate shows one.
    """
    if question.kind == "title":
        return passage.text.removeprefix(passage.title).strip() or passage.whole
    if question.kind == "sentence":
        return passage.whole.replace(question.text, " ")
    return passage.whole


def sentences(text: str) -> list[str]:
    """Return the sentences of *text* that are neither short nor very long."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if len(part.split()) in _SENTENCE_WORDS]


def _kinds(passage: Passage, *, unique_title: bool) -> Sequence[Kind]:
    kinds: list[Kind] = ["keys"]
    if passage.title and unique_title and passage.text and len(passage.title.split()) <= _MAX_TITLE_WORDS:
        kinds.append("title")
    if len(sentences(passage.text)) >= _MIN_SENTENCES:
        kinds.append("sentence")
    return kinds


def _cut(passage: Passage, kind: Kind, rare: "_Rarity", rng: random.Random) -> str:
    if kind == "title":
        return passage.title
    found = sentences(passage.text)
    sentence = rng.choice(found) if found else passage.whole[:_MAX_CHARS]
    return sentence if kind == "sentence" else rare.keys(sentence, rng)


class _Rarity:
    """How rare each word is among some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = len(texts)
        self._found: Counter[str] = Counter()
        for text in texts:
            self._found.update({word.lower() for word in _WORD.findall(text)})

    def keys(self, sentence: str, rng: random.Random) -> str:
        """Return two to five of the rarest words of *sentence*, with some chance in which, in their order there."""
        words = [word for word in dict.fromkeys(_WORD.findall(sentence)) if word.lower() not in _STOP]
        weighed = {word: math.log(self._texts / (1 + self._found[word.lower()])) + rng.random() for word in words}
        kept = set(sorted(words, key=lambda word: -weighed[word])[: rng.randint(2, 5)])
        return " ".join(word for word in words if word in kept)
