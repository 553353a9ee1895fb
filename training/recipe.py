"""Every number that the model is made with, in one place; README.md says why each is what it is."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

EMBEDDING_MODEL = "all-MiniLM-L6-v2"
FIRST_STAGE = f"late-interaction/{EMBEDDING_MODEL}"


class Share(NamedTuple):
    """How many real questions of a set are taken at most, and how often each is asked in one round."""

    most: int
    times: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    How the student is taught. Everything here decides the weights; times and places are not here.

    *mixture* weighs MaxSim, dense cosine and BM25, each divided by its usual spread within a question's candidates;
    *sharpness* multiplies the sum before the softmax, and *known_bonus* and *cut_bonus* are added to a passage that is
    known to answer a real question, or that a question was cut from. A list has one answer, *hard* passages among
    the teacher's best *hard_depth*, and others from anywhere. *absolute* is the part of the loss that says which
    passages answer a question at all.
    """

    seed: int = 1
    mixture: tuple[float, float, float] = (0.5, 0.3, 0.2)
    sharpness: float = 1.5
    known_bonus: float = 2.0
    cut_bonus: float = 1.0
    absolute: float = 0.1
    questions_per_step: int = 8
    passages_per_question: int = 6
    hard: int = 4
    hard_depth: int = 20
    short_tokens: int = 144
    long_tokens: int = 224
    long_from: float = 0.75
    max_tokens: int = 256
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_gradient: float = 1.0
    averaging: float = 0.998
    real: dict[str, Share] = field(
        default_factory=lambda: {
            "squad_dev": Share(5000, 1),
            "medquad": Share(3500, 1),
            "scifact": Share(1000, 3),
            "pubmedqa_l": Share(1000, 2),
        }
    )

    def key(self, *inputs: str) -> str:
        """Return a name for what this recipe makes of *inputs* (checksums): another whenever one of them changes."""
        values = json.dumps([asdict(self), inputs], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]
