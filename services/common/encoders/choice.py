"""
Which runtime and precision compute a model: the fastest of those that stay as near to fp32 as is asked.

Every candidate is first held against torch at fp32 on golden samples (the gate: see Trial), then those left are timed
in turn. The score is the geometric mean of two rates: samples a second in batches of about 130 tokens a sample, and
short samples a second one at a time; a candidate twice as fast at one and half as fast at the other is neither better
nor worse.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple

import structlog

from services.common.encoders.hardware import Processor
from services.common.encoders.protocol import EncoderOptions
from services.common.encoders.store import Choice
from services.common.encoders.trial import ModelT, Trial
from services.common.model_errors import InvalidModel

log = structlog.get_logger(__name__)

MEASURING_S = 2.0
_ROUNDS = 5  # At least, where a model is quick enough for them …
_MOST_ROUNDS = 40  # … and at most, …
_UNSETTLED_TIMES = 4.0  # … so many times the time that is meant for it, …
_ALIKE = 1.1  # … while some candidate's two best times differ by more: others are using the machine.
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
    make: Callable[[Candidate], ModelT],
    trial: Trial[ModelT],
    *,
    honour: bool,
    measuring_s: float = MEASURING_S,
) -> tuple[ModelT, Choice]:
    """
    Return the best of *tried* with the choice to keep; *make* makes a candidate's model.

    *honour* takes a precision that was asked for even below the bound, with a warning that states the loss. The
    models that were not chosen are closed.

    Raises:
        InvalidModel: No candidate works.
    """
    gate = _Gate(trial)
    made = gate.admit(tried, make, honour=honour)
    rates: dict[Candidate, _Rates] = {}
    if len(made) > 1:
        rates = _time_in_turn(made, trial, measuring_s)
        for candidate, figures in rates.items():
            gate.measured[str(candidate)] |= {
                f"batch_{trial.unit}s_per_s": round(figures.batch_per_s, 1),
                f"short_{trial.unit}_ms": round(figures.short_ms, 3),
            }
        best = max(made, key=lambda candidate: rates[candidate].score)
    else:
        (best,) = made
    for candidate, model in made.items():
        if candidate != best:
            model.close()
    choice = Choice(
        best.runtime,
        best.precision,
        best.autocast,
        _reason(best, rates, trial.unit, gate.words[best], gate.refused),
        gate.measured,
        trial.golden,
        min(trial.least_nearness, trial.nearness(made[best]) - _FLOOR_SLACK),
    )
    return made[best], choice


class _Gate(Generic[ModelT]):
    """Holds candidates against fp32, and notes what it found."""

    def __init__(self, trial: Trial[ModelT]) -> None:
        self._trial = trial
        self.measured: dict[str, dict[str, float]] = {}
        self.words: dict[Candidate, str] = {}
        self.refused: list[str] = []

    def admit(
        self, tried: Sequence[Candidate], make: Callable[[Candidate], ModelT], *, honour: bool
    ) -> dict[Candidate, ModelT]:
        """Return the models that pass; where *honour* and none does, the one that is nearest to fp32."""
        made: dict[Candidate, ModelT] = {}
        below: list[tuple[float, Candidate]] = []
        waiting = list(tried)
        while waiting:
            candidate = waiting.pop(0)
            try:
                model = make(candidate)
                verdict = self._trial.judge(None if candidate == REFERENCE else model)
            except Exception as error:  # A runtime fails on an architecture in any way; the next may not.
                told = str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
                self._refuse(candidate, told)
                continue
            self.measured[str(candidate)] = dict(verdict.figures)
            self.words[candidate] = verdict.words
            if verdict.passes:
                made[candidate] = model
                continue
            model.close()
            below.append((verdict.nearness, candidate))
            self._refuse(candidate, f"{verdict.words}, {verdict.bound}")
            if candidate.runtime == "torch" and not candidate.autocast and candidate.precision != "fp32":
                waiting.insert(0, candidate._replace(autocast=True))
        if not made and below and honour:
            _, candidate = max(below)
            log.warning("asked_precision_loses", candidate=str(candidate), why=self.words[candidate])
            self.refused = [line for line in self.refused if not line.startswith(f"{candidate} refused")]
            made[candidate] = make(candidate)
        if not made:
            raise InvalidModel("nothing computes this model as asked: " + "; ".join(self.refused))
        return made

    def _refuse(self, candidate: Candidate, why: str) -> None:
        self.refused.append(f"{candidate} refused: {why}")
        log.warning("candidate_refused", candidate=str(candidate), why=why)


class _Rates(NamedTuple):
    batch_per_s: float
    short_ms: float

    @property
    def score(self) -> float:
        """See the module."""
        return math.sqrt(self.batch_per_s * 1000 / self.short_ms)


def _time_in_turn(
    made: Mapping[Candidate, ModelT], trial: Trial[ModelT], measuring_s: float
) -> dict[Candidate, _Rates]:
    """
    Time all candidates round by round, so that what else the machine does falls on all of them alike.

    The best time of each counts: others only ever add to it. A choice is kept for good, so on a busy machine more rounds
    are given to it, until the best times come twice.
    """
    batch_s: dict[Candidate, list[float]] = {candidate: [] for candidate in made}
    short_s: dict[Candidate, list[float]] = {candidate: [] for candidate in made}
    items: dict[Candidate, int] = {}
    started = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        for candidate, model in made.items():
            # Untimed: the threads of the candidate before spin for a while, this one's have to wake.
            trial.short(model)
            if turn == 0:
                items[candidate] = trial.batch(model)
            batch_s[candidate].append(_seconds(trial.batch, model))
            short_s[candidate] += [_seconds(trial.short, model) for _ in range(5)]
        taken_s = time.perf_counter() - started
        if taken_s > _UNSETTLED_TIMES * measuring_s:
            break
        if (turn + 1 >= _ROUNDS or taken_s > measuring_s) and all(map(_settled, batch_s.values())):
            break
    if not all(map(_settled, batch_s.values())):
        log.warning("measured_on_a_busy_machine", measure_again_with="an empty model cache")
    return {
        candidate: _Rates(items[candidate] / min(batch_s[candidate]), 1000 * min(short_s[candidate]))
        for candidate in made
    }


def _settled(seconds: Sequence[float]) -> bool:
    """Whether the best of *seconds* was met twice."""
    best, *others = sorted(seconds)
    return bool(others) and others[0] <= _ALIKE * best


def _seconds(work: Callable[[ModelT], object], model: ModelT) -> float:
    started = time.perf_counter()
    work(model)
    return time.perf_counter() - started


def _reason(
    best: Candidate, rates: Mapping[Candidate, _Rates], unit: str, nearness: str, refused: Sequence[str]
) -> str:
    if rates:
        others = ", ".join(str(candidate) for candidate in rates if candidate != best)
        figures = rates[best]
        parts = [
            f"{best} measured fastest ({figures.batch_per_s:.0f} {unit}s/s in batches, {figures.short_ms:.1f} ms "
            f"a short {unit}; beside {others}); {nearness}"
        ]
    else:
        parts = [f"{best}: the only one that was asked for or works here; {nearness}"]
    return "; ".join([*parts, *refused])
