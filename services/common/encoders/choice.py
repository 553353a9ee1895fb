"""
Which runtime and precision compute a model: the fastest of those that stay as near to fp32 as is asked.

Every candidate is first held against torch at fp32 on golden texts of many lengths and scripts (the gate: a cosine of
0.999 at least), then those left are timed in turn. The score is the geometric mean of two rates: texts a second in
batches of about 130 tokens a text, and short texts a second one at a time; a candidate twice as fast at one and half
as fast at the other is neither better nor worse.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from services.common.encoders.golden import (
    GOLDEN_TEXTS,
    MIN_COSINE,
    SHORT_GOLDEN_TEXTS,
    Agreement,
    agreement,
    golden_batches,
)
from services.common.encoders.hardware import Processor
from services.common.encoders.protocol import Encoder, EncoderOptions
from services.common.encoders.store import Choice
from services.common.model_files import InvalidModel
from services.common.tokens import Tokens

log = structlog.get_logger(__name__)

MEASURING_S = 2.0
_ROUNDS = 5
_BATCH_ITEMS, _BATCH_TOKENS, _SHORT_TOKENS = 8, 130, 10
_GPU_BATCH_ITEMS = 64
_FLOOR_SLACK = 0.002


class Candidate(NamedTuple):
    """A runtime at a precision; *autocast* is torch computing at it over fp32 weights."""

    runtime: str
    precision: str
    autocast: bool = False

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}" + (" autocast" if self.autocast else "")


class Unusable(Exception):
    """A candidate cannot be made or does not run; the message says why."""


REFERENCE = Candidate("torch", "fp32")
Make = Callable[[Candidate], Encoder]


def candidates(options: EncoderOptions, device: str, cpu: Processor) -> list[Candidate]:
    """
    Return what may be tried on *device*: where *options* leave a choice, what it computes natively; int8 only if asked.

    Raises:
        InvalidModel: The options contradict each other or the device.
    """
    if options.runtime == "openvino" and device != "cpu":
        raise InvalidModel(f"the openvino runtime computes on the CPU; device {device} needs the torch runtime")
    if options.precision == "int8" and (options.runtime == "torch" or device != "cpu"):
        raise InvalidModel("precision int8 needs the openvino runtime, on the CPU")
    precisions: list[str]
    if options.precision != "auto":
        precisions = [options.precision]
    elif device == "cpu":
        precisions = ["bf16"] * cpu.has_bf16 + ["fp16"] * cpu.has_fp16 + ["fp32"]
    else:
        precisions = ["fp16", "bf16", "fp32"] if device == "cuda" else ["fp16", "fp32"]
    found = []
    if device == "cpu" and options.runtime != "torch":
        found += [Candidate("openvino", precision) for precision in precisions]
    if options.runtime != "openvino":
        found += [Candidate("torch", precision) for precision in precisions if precision != "int8"]
    return found


def choose(
    tried: Sequence[Candidate],
    make: Make,
    reference: Encoder,
    *,
    honour: bool,
    measuring_s: float = MEASURING_S,
) -> tuple[Encoder, Choice]:
    """
    Return the best of *tried* with the choice to keep; *make* makes a candidate's encoder, *reference* is at fp32.

    *honour* takes a precision that was asked for even below the bound, with a warning that states the loss. The
    encoders that were not chosen are closed; the reference is not.

    Raises:
        InvalidModel: No candidate works.
    """
    gate = _Gate(reference)
    made = _admit(tried, make, gate, honour=honour)
    rates: dict[Candidate, _Rates] = {}
    if len(made) > 1:
        rates = _time_in_turn(made, measuring_s)
        for candidate, figures in rates.items():
            gate.measured[str(candidate)] |= {
                "batch_texts_per_s": round(figures.batch_texts_per_s, 1),
                "short_text_ms": round(figures.short_text_ms, 3),
            }
        best = max(made, key=lambda candidate: rates[candidate].score)
    else:
        (best,) = made
    for candidate, encoder in made.items():
        if candidate != best:
            encoder.close()
    short = agreement(made[best].pooled(made[best].tokenize(SHORT_GOLDEN_TEXTS)), gate.short)
    choice = Choice(
        best.runtime,
        best.precision,
        best.autocast,
        _reason(best, list(made), rates, gate),
        gate.measured,
        gate.short,
        min(MIN_COSINE, short.least - _FLOOR_SLACK),
    )
    return made[best], choice


class _Gate:
    """Holds candidates against fp32, and notes what it found."""

    def __init__(self, reference: Encoder) -> None:
        self._reference = reference
        self.short = reference.pooled(reference.tokenize(SHORT_GOLDEN_TEXTS))
        self.measured: dict[str, dict[str, float]] = {}
        self.refused: list[str] = []

    @cached_property
    def _batches(self) -> list[list[Tokens]]:
        return golden_batches(self._reference.tokenize(GOLDEN_TEXTS))

    @cached_property
    def _expected(self) -> NDArray[np.float32]:
        return self._vectors(self._reference)

    def _vectors(self, encoder: Encoder) -> NDArray[np.float32]:
        return np.concatenate([encoder.pooled(batch) for batch in self._batches])

    def least_cosine(self, candidate: Candidate, encoder: Encoder) -> float:
        """Return the least cosine of *encoder*'s vectors to fp32's."""
        exact = Agreement(1.0, 1.0)
        found = exact if candidate == REFERENCE else agreement(self._vectors(encoder), self._expected)
        self.measured[str(candidate)] = {"min_cosine": round(found.least, 6), "mean_cosine": round(found.mean, 6)}
        return found.least

    def refuse(self, candidate: Candidate, why: str) -> None:
        """Note that *candidate* is out."""
        self.refused.append(f"{candidate} refused: {why}")
        log.warning("candidate_refused", candidate=str(candidate), why=why)


def _admit(tried: Sequence[Candidate], make: Make, gate: _Gate, *, honour: bool) -> dict[Candidate, Encoder]:
    """Return the encoders that pass; where *honour* and none does, the one that is nearest to fp32."""
    made: dict[Candidate, Encoder] = {}
    below: list[tuple[float, Candidate]] = []
    waiting = list(tried)
    while waiting:
        candidate = waiting.pop(0)
        try:
            encoder = make(candidate)
            least = gate.least_cosine(candidate, encoder)
        except Exception as error:  # A runtime fails on an architecture in any way; the next may not.
            gate.refuse(candidate, str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}")
            continue
        if least >= MIN_COSINE:
            made[candidate] = encoder
            continue
        encoder.close()
        below.append((least, candidate))
        gate.refuse(candidate, f"its least cosine to fp32 is {least:.5f}, under {MIN_COSINE}")
        if candidate.runtime == "torch" and not candidate.autocast and candidate.precision != "fp32":
            waiting.insert(0, candidate._replace(autocast=True))
    if not made and below and honour:
        least, candidate = max(below)
        log.warning("asked_precision_loses", candidate=str(candidate), min_cosine=round(least, 5), bound=MIN_COSINE)
        gate.refused = [line for line in gate.refused if not line.startswith(f"{candidate} refused")]
        made[candidate] = make(candidate)
    if not made:
        raise InvalidModel("nothing computes this model as asked: " + "; ".join(gate.refused))
    return made


class _Rates(NamedTuple):
    batch_texts_per_s: float
    short_text_ms: float

    @property
    def score(self) -> float:
        """See the module."""
        return math.sqrt(self.batch_texts_per_s * 1000 / self.short_text_ms)


def _time_in_turn(made: Mapping[Candidate, Encoder], measuring_s: float) -> dict[Candidate, _Rates]:
    """Time all candidates round by round, so that what else the machine does falls on all of them alike."""
    batch_s: dict[Candidate, list[float]] = {candidate: [] for candidate in made}
    short_s: dict[Candidate, list[float]] = {candidate: [] for candidate in made}
    ends = time.perf_counter() + measuring_s
    for turn in range(_ROUNDS):
        for candidate, encoder in made.items():
            batch, short = _sample_batches(encoder)
            # Untimed: the threads of the candidate before spin for a while, this one's have to wake.
            encoder.pooled(short)
            if turn == 0:
                encoder.pooled(batch)
            batch_s[candidate].append(_seconds(encoder, batch))
            short_s[candidate] += [_seconds(encoder, short) for _ in range(5)]
        if time.perf_counter() > ends:
            break
    rates = {}
    for candidate, encoder in made.items():
        items = len(_sample_batches(encoder)[0])
        rates[candidate] = _Rates(
            items / statistics.median(batch_s[candidate]), 1000 * statistics.median(short_s[candidate])
        )
    return rates


def _sample_batches(encoder: Encoder) -> tuple[list[Tokens], list[Tokens]]:
    """Return a batch of texts of about 130 tokens, and one of a single short text."""
    (text,) = encoder.tokenize(["The quick brown fox jumps over the lazy dog again. " * 40])
    items = _BATCH_ITEMS if encoder.device == "cpu" else _GPU_BATCH_ITEMS
    return [Tokens(text.ids[:_BATCH_TOKENS], True)] * items, [Tokens(text.ids[:_SHORT_TOKENS], True)]


def _seconds(encoder: Encoder, batch: Sequence[Tokens]) -> float:
    started = time.perf_counter()
    encoder.pooled(batch)
    return time.perf_counter() - started


def _reason(best: Candidate, made: Sequence[Candidate], rates: Mapping[Candidate, _Rates], gate: _Gate) -> str:
    least = gate.measured[str(best)]["min_cosine"]
    cosine = f"least cosine to fp32 over the golden texts {least:.5f}"
    if rates:
        others = ", ".join(str(candidate) for candidate in made if candidate != best)
        figures = rates[best]
        parts = [
            f"{best} measured fastest ({figures.batch_texts_per_s:.0f} texts/s in batches, {figures.short_text_ms:.1f} ms "
            f"a short text; beside {others}); {cosine}"
        ]
    else:
        parts = [f"{best}: the only one that was asked for or works here; {cosine}"]
    return "; ".join([*parts, *gate.refused])
