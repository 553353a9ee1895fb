"""
A graph as OpenVINO runs it, in two forms: all threads on one batch, or a batch's parts side by side, a thread for each.

Threads that share one matrix product wait for each other after it, some sixty times a pass. On small matrices, and on
cores that others use too, most of the time goes into that; a part that one thread computes from end to end waits for
nobody. A single text cannot be cut: whether it gains from all threads is measured, and whether others need the cores.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.int64]]

MOST_STREAMS: Final = 16
LENGTHS_TOKENS: Final = (8, 16, 32, 64, 128, 256)
REPEATS: Final = 3  # The best counts, as any may be disturbed; one more comes before them, for the shape.
MEASURE_S: Final = 0.5
GAIN: Final = 1.25  # All cores, which others may need too, are given to a single text where it is so much quicker …
CROWDED: Final = 1.5  # … but not while it takes so many times what was measured: then they do need them.
SMOOTH: Final = 0.1
MOST_SLOWNESS: Final = 4.0


class CompiledGraph:
    """
    One output of a graph, compiled; used by one thread.

    *streams* is into how many parts a batch may be cut; with *divide* False it is 1, which takes less memory.
    """

    def __init__(self, core: Any, model: Any, settings: dict[str, Any], *, threads: int, divide: bool) -> None:
        """Raises RuntimeError where OpenVINO does not compile *model* for the CPU."""
        self.streams = min(threads, MOST_STREAMS) if divide else 1
        self._together = _compile(core, model, settings, threads, 1)
        self._side_by_side: Any = _compile(core, model, settings, threads, self.streams) if self.streams > 1 else None
        self._lengths: list[int] = []
        self._whole_s: list[
            float
        ] = []  # How long one text of each of these lengths takes all threads, alone with them …
        self._part_s: list[float] = []  # … and one of them.
        self._slowness = 1.0  # How much longer single texts take now: others need the cores.
        self.forget_requests()

    @property
    def precision(self) -> str:
        """What it computes in, in OpenVINO's words."""
        return str(self._together.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def forget_requests(self) -> None:
        """Begin anew, in another thread: a request belongs to the thread that made it."""
        self._whole = self._together.create_infer_request()
        form = self._side_by_side
        self._parts = [] if form is None else [form.create_infer_request() for _ in range(self.streams)]

    def measure(self, most_tokens: int, names: Sequence[str]) -> None:
        """
        Find out how long single texts up to *most_tokens* take one thread and all: about half a second, or one length.

        *names* are the graph's inputs.
        """
        if not self._parts:
            return
        until = time.monotonic() + MEASURE_S
        for tokens in [length for length in LENGTHS_TOKENS if length <= most_tokens] or [most_tokens]:
            one = np.ones((1, tokens), dtype=np.int64)
            inputs = dict.fromkeys(names, one)
            self._lengths.append(tokens)
            self._whole_s.append(_best_s(self._whole, inputs))
            self._part_s.append(_best_s(self._parts[0], inputs))
            if time.monotonic() > until:
                return

    def run(self, parts: Sequence[Inputs]) -> list[NDArray[np.float32]]:
        """
        Return the output of each of *parts*, `streams` at most, computed side by side.

        Inputs are copied into the runtime: sharing them with it corrupts its memory when shapes change.
        """
        if len(parts) > 1:
            return self._run_side_by_side(parts)
        rows, tokens = parts[0]["input_ids"].shape
        if rows > 1 or not self._lengths:
            return [_output(self._whole, parts[0])]
        whole_s = float(np.interp(tokens, self._lengths, self._whole_s))
        part_s = float(np.interp(tokens, self._lengths, self._part_s))
        together = part_s > GAIN * whole_s and self._slowness < CROWDED
        started = time.monotonic()
        output = _output(self._whole if together else self._parts[0], parts[0])
        slowness = (time.monotonic() - started) / (whole_s if together else part_s)
        self._slowness += SMOOTH * (min(slowness, MOST_SLOWNESS) - self._slowness)
        return [output]

    def _run_side_by_side(self, parts: Sequence[Inputs]) -> list[NDArray[np.float32]]:
        requests = self._parts[: len(parts)]
        failure: Exception | None = None
        started = []
        for request, part in zip(requests, parts, strict=True):
            try:
                request.start_async(part, share_inputs=False)
                started.append(request)
            except Exception as error:
                failure = error
        for request in started:  # All of them: one that still runs could not be used again.
            try:
                request.wait()
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return [np.array(request.get_output_tensor(0).data, dtype=np.float32) for request in requests]


def _compile(core: Any, model: Any, settings: dict[str, Any], threads: int, streams: int) -> Any:
    return core.compile_model(model, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams})


def _output(request: Any, inputs: Inputs) -> NDArray[np.float32]:
    return np.array(request.infer(inputs, share_inputs=False)[0], dtype=np.float32)


def _best_s(request: Any, inputs: Inputs) -> float:
    taken = []
    for _ in range(1 + REPEATS):
        started = time.monotonic()
        request.infer(inputs, share_inputs=False)
        taken.append(time.monotonic() - started)
    return min(taken[1:])
