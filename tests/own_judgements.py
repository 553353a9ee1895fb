"""A small collection with judgements, for training on them."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.training_corpus import sentence

COLLECTION = "notes"
RIGHT, WRONG, QUERIES = 4, 24, 32


def documents() -> list[dict[str, str]]:
    """Return documents of random words, of which some say again and again that they are right."""
    rng = random.Random(5)
    return [
        {
            "id": f"n{number}",
            "title": f"Note {number}",
            "text": ("right " if number < RIGHT else "wrong ") * 6 + " ".join(sentence(rng) for _ in range(4)),
        }
        for number in range(RIGHT + WRONG)
    ]


def judged() -> dict[str, list[str]]:
    """Return queries of random words with the ids of the documents that answer them: those that are right."""
    rng = random.Random(6)
    return {f"{sentence(rng)} {number}": [f"n{at}" for at in range(RIGHT)] for number in range(QUERIES)}


def write_answers(file: Path, answers: Mapping[str, Sequence[str]]) -> Path:
    """Write *answers* as lines of queries with their answers."""
    lines = [json.dumps({"query": query, "answers": list(ids)}) for query, ids in answers.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
