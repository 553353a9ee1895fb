"""Twenty questions about the demo corpus with their right answers, and the measure that scores a ranking."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Question:
    """What a person asks, and the names of the documents that answer it, any of which will do."""

    id: str
    query: str
    answers: tuple[str, ...]


def load_questions() -> list[Question]:
    """Return the questions shipped with the package, in order."""
    lines = files("tercet.demo").joinpath("questions.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [Question(entry["id"], entry["query"], tuple(entry["answers"])) for entry in entries]


def reciprocal_rank(hit_ids: Sequence[str], answers: Collection[str], cutoff: int = 10) -> float:
    """
    Return 1 / the rank of the first right hit, or 0.0 when none of the first *cutoff* hits is right.

    A chunk (``<id>#<n>``) counts as the document it is part of.
    """
    for rank, hit_id in enumerate(hit_ids[:cutoff], start=1):
        if hit_id.partition("#")[0] in answers:
            return 1 / rank
    return 0.0
