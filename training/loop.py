"""
The training loop: steps until the budget is spent, checkpoints on the way, an evaluation now and then.

Stopped at any moment, even by SIGKILL, it goes on from its last checkpoint and comes to the same weights: a step
depends on the recipe, the step's number and the weights before it alone.
"""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from training.lists import Lists, TrainingList
from training.loss import absolute_loss, agreement, distillation_loss
from training.model import logits, trainable
from training.recipe import Recipe

Say = Callable[[str], None]

_CHECKPOINT_S = 120.0
_TELL_S = 30.0
_EVALUATE_S = 600.0
_FIRST_EVALUATION_STEP = 200
_STILL_S, _STILL_TIMES, _REMEMBERED_STEPS = 10.0, 3.0, 31
_LEAST_RATE = 0.01
_EVALUATION_LISTS = 4


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a number of steps, which makes the same model each time, or *seconds* of training."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, steps: int, seconds: float) -> float:
        """Return how much of the budget is spent, from 0 to 1."""
        if self.steps is not None:
            return steps / self.steps if steps < self.steps else 1.0
        return min(1.0, seconds / max(1e-9, self.seconds or 0.0))


@dataclass
class Progress:
    """What has been done: *seconds* of training are counted without pauses, *log* is what evaluations said."""

    steps: int = 0
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)


class StepTimes:
    """How long steps last. Where one lasts much longer than the others, something stood still: that is not counted."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_REMEMBERED_STEPS)

    def counted(self, duration_s: float) -> float:
        """Return how much of a step's *duration_s* counts as training."""
        usual = median(self._last) if self._last else 0.0
        counted = min(duration_s, max(_STILL_S, _STILL_TIMES * usual))
        self._last.append(counted)
        return counted

    def rate(self) -> float:
        """Return the steps per second lately."""
        return len(self._last) / max(1e-9, sum(self._last))


class Training:
    """
    Trains *student* on *lists*; `run` may be called again after `Stopped`, or in another process.

    *checkpoint* is the file that it goes on from, if there is one of the same *key*.
    """

    def __init__(
        self, student: CrossEncoder, lists: Lists, recipe: Recipe, *, checkpoint: Path, key: str, say: Say
    ) -> None:
        self.student, self._lists, self._recipe = student, lists, recipe
        self._file, self._key, self._say = checkpoint, key, say
        self._weights = [parameter for _, parameter in trainable(student)]
        self._average = [weight.detach().clone() for weight in self._weights]
        decayed = [weight for weight in self._weights if weight.ndim > 1]
        plain = [weight for weight in self._weights if weight.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            fused=True,
        )
        self._times = StepTimes()
        self.progress = Progress()
        self.stop = threading.Event()

    def run(self, budget: Budget, fixed: list[TrainingList], *, evaluate_s: float = _EVALUATE_S) -> None:
        """
        Train until *budget* is spent, then leave the averaged weights in the student.

        *fixed* lists are evaluated on after the first 200 steps, then every *evaluate_s* of training, and at the end.

        Raises:
            Stopped: `stop` was set; the checkpoint has all that was done.
        """
        self._resume()
        done = self.progress
        if done.steps and budget.progress(done.steps, done.seconds) >= 1.0:
            self._put(self._average)
            return
        saved, told, losses = time.monotonic(), time.monotonic(), deque[float](maxlen=50)
        self.student.eval()
        while budget.progress(done.steps, done.seconds) < 1.0:
            started = time.monotonic()
            losses.append(self._step(budget.progress(done.steps, done.seconds)))
            counted = self._times.counted(time.monotonic() - started)
            due = int((done.seconds + counted) / evaluate_s) > int(done.seconds / evaluate_s)
            done.steps, done.seconds = done.steps + 1, done.seconds + counted
            if due or done.steps == _FIRST_EVALUATION_STEP:
                self._evaluate(fixed)
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                self._tell(budget, sum(losses) / len(losses))
            if time.monotonic() - saved >= _CHECKPOINT_S or self.stop.is_set():
                self._save()
                saved = time.monotonic()
            if self.stop.is_set():
                raise Stopped(f"stopped after step {done.steps}; the same command goes on from there")
        self._evaluate(fixed)
        self._save()
        self._put(self._average)

    def _step(self, spent: float) -> float:
        """Make one step of gradient descent and return its loss."""
        recipe, number = self._recipe, self.progress.steps
        lists = self._lists.step(number)
        long = spent >= recipe.long_from
        made = logits(
            self.student,
            [(one.question, text) for one in lists for text in one.texts],
            max_tokens=recipe.long_tokens if long else recipe.short_tokens,
        )
        loss = distillation_loss(made, lists) + recipe.absolute * absolute_loss(made, lists)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, recipe.max_gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = (
                recipe.learning_rate * min(1.0, (number + 1) / recipe.warmup_steps) * max(_LEAST_RATE, 1 - spent)
            )
        self._optimizer.step()
        # Early on the average would be of the beginning: it follows faster then.
        follow = 1 - min(recipe.averaging, (number + 1) / (number + 10))
        with torch.no_grad():
            for average, weight in zip(self._average, self._weights, strict=True):
                average.lerp_(weight, follow)
        return float(loss.detach())

    def _tell(self, budget: Budget, loss: float) -> None:
        done = self.progress
        pairs = self._times.rate() * self._recipe.questions_per_step * self._recipe.passages_per_question
        share = budget.progress(done.steps, done.seconds)
        left = done.seconds * (1 - share) / max(1e-9, share) / 60
        self._say(
            f"step {done.steps}: loss {loss:.4f}, {pairs:.0f} pairs/s, {done.seconds / 60:.1f} min of training,"
            f" {100 * share:.0f} % done, {left:.0f} min left"
        )

    def _evaluate(self, fixed: list[TrainingList]) -> None:
        """Say how far the averaged weights are from the teacher on lists that are never trained on."""
        if not fixed:
            return
        now = [weight.detach().clone() for weight in self._weights]
        self._put(self._average)
        made = []
        with torch.inference_mode():
            for start in range(0, len(fixed), _EVALUATION_LISTS):
                pairs = [(one.question, text) for one in fixed[start : start + _EVALUATION_LISTS] for text in one.texts]
                made.append(logits(self.student, pairs, max_tokens=self._recipe.long_tokens))
        self._put(now)
        together = torch.cat(made)
        line = (
            f"held-back lists after step {self.progress.steps} ({self.progress.seconds / 60:.1f} min):"
            f" loss {float(distillation_loss(together, fixed)):.4f},"
            f" the answer is first in {100 * agreement(together, fixed):.0f} %"
        )
        self.progress.log.append(line)
        self._say(line)

    def _put(self, weights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for mine, other in zip(self._weights, weights, strict=True):
                mine.copy_(other)

    def _save(self) -> None:
        done = self.progress
        state = {
            "key": self._key,
            "steps": done.steps,
            "seconds": done.seconds,
            "log": done.log,
            "weights": [weight.detach() for weight in self._weights],
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, made = tempfile.mkstemp(prefix=".making-", dir=self._file.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(made, self._file)
        except BaseException:
            os.unlink(made)
            raise

    def _resume(self) -> None:
        for left in self._file.parent.glob(".making-*"):
            left.unlink()
        state: dict[str, Any] | None = None
        if self._file.is_file():
            state = torch.load(self._file, map_location=self.student.device, weights_only=True)
        if state is None or state["key"] != self._key:
            return
        self._put(state["weights"])
        self._average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(state["steps"], state["seconds"], state["log"])
        self._say(f"goes on after step {state['steps']} ({state['seconds'] / 60:.1f} min of training)")
