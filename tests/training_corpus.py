"""A small corpus in the layout that training reads, written on the spot, and a small embedding model for it."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

from training.data import is_held_back

_CONTENT = "river stone glass engine yellow market doctor winter music bridge paper signal garden window copper storm"
_WORDS = tuple(_CONTENT.split())
_FILLER = ("the", "and", "of", "with", "under", "over", "near", "after", "before", "between")
ARTICLES_TRAINED, ARTICLES_HELD_BACK = 8, 2
PASSAGES_AN_ARTICLE = 4


def write_corpus(folder: Path) -> Path:
    """Write squad_dev (with held-back articles), scifact and wikiqa to *folder* and return it."""
    rng = random.Random(1)
    _write_squad(folder / "squad_dev", rng)
    _write_scifact(folder / "scifact", rng)
    _write_wikiqa(folder / "wikiqa", rng)
    return folder


def sentence(rng: random.Random, words: int = 8) -> str:
    """Return a sentence of random words."""
    return " ".join(rng.choice(_WORDS if n % 2 else _FILLER) for n in range(words)).capitalize() + "."


def write_lines(file: Path, entries: Iterable[dict[str, object]]) -> None:
    """Write *entries* as compressed JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in entries)


def _write_squad(folder: Path, rng: random.Random) -> None:
    names = [f"Article {number}" for number in range(200)]
    held_back = [name for name in names if is_held_back("squad_dev", name)][:ARTICLES_HELD_BACK]
    trained = [name for name in names if not is_held_back("squad_dev", name)][:ARTICLES_TRAINED]
    passages, pairs = [], []
    for name in [*trained, *held_back]:
        for number in range(PASSAGES_AN_ARTICLE):
            text = " ".join(sentence(rng) for _ in range(4))
            id_ = f"{name}-{number}"
            passages.append({"_id": id_, "title": name, "text": text})
            pairs.append({"query": f"Which {text.split()[1]} is {text.split()[3]} {id_}?", "passage_id": id_})
    pairs.append({"query": pairs[0]["query"].upper() + " ", "passage_id": passages[1]["_id"]})
    write_lines(folder / "passages.jsonl.gz", passages)
    write_lines(folder / "pairs.jsonl.gz", pairs)


def _write_scifact(folder: Path, rng: random.Random) -> None:
    passages = [
        {"_id": str(number), "title": f"{sentence(rng, 5)} {number}", "text": " ".join(sentence(rng) for _ in range(4))}
        for number in range(24)
    ]
    claims = [
        {"_id": f"c{number}", "text": f"{passage['text'].split('.')[0]}"} for number, passage in enumerate(passages)
    ]
    write_lines(folder / "corpus.jsonl.gz", passages)
    write_lines(folder / "queries.jsonl.gz", claims)
    write_lines(folder / "pairs.jsonl.gz", [{"query": claims[n]["text"], "passage_id": str(n)} for n in range(6, 24)])
    _write_qrels(folder / "qrels.tsv", [(f"c{number}", str(number), 1) for number in range(6)])


def _write_wikiqa(folder: Path, rng: random.Random) -> None:
    texts = [sentence(rng, 10) for _ in range(16)]
    write_lines(
        folder / "corpus.jsonl.gz", [{"_id": f"D{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    )
    write_lines(
        folder / "queries.jsonl.gz", [{"_id": f"Q{n}", "text": " ".join(texts[n].split()[:4])} for n in range(5)]
    )
    judgements = [(f"Q{n}", f"D{n}", 1) for n in range(5)]
    _write_qrels(folder / "qrels.tsv", [*judgements, ("Q0", "D9", 0)])


def _write_qrels(file: Path, judgements: Iterable[tuple[str, str, int]]) -> None:
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, judgement)) for judgement in judgements)]
    file.write_text("\n".join(lines) + "\n")
