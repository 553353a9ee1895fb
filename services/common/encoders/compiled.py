"""
A graph as OpenVINO runs it, in two forms: all threads on one batch, or a batch's parts side by side, a thread for each.

Threads that share one matrix product wait for each other after it, some sixty times a pass. On small matrices, and on
cores that others use too, most of the time goes into that; a part that one thread computes from end to end waits for
nobody. A single text cannot be cut: whether it gains from all threads is measured.
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
GAIN: Final = 1.25  # All cores, which others may need too, are given to a single text where it is so much quicker.


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
        self._alone_below_tokens = 0  # A single text of fewer tokens is one stream's work.
        self.forget_requests()

    @property
    def precision(self) -> str:
        """What it computes in, in OpenVINO's words."""
        return str(self._together.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def forget_requests(self) -> None:
        """Begin anew, in another thread: a request belongs to the thread that made it."""
        self._whole = self._together.create_infer_request()
        self._parts = (
            [self._side_by_side.create_infer_request() for _ in range(self.streams)] if self.streams > 1 else []
        )

    def measure(self, most_tokens: int) -> None:
        """Find out from which length on, up to *most_tokens*, a single text gains from all threads: half a second at most."""
        if not self._parts:
            return
        until = time.monotonic() + MEASURE_S
        self._alone_below_tokens = LENGTHS_TOKENS[0]
        for tokens in LENGTHS_TOKENS:
            if tokens > most_tokens or time.monotonic() > until:
                return
            one = np.ones((1, tokens), dtype=np.int64)
            inputs = {"input_ids": one, "attention_mask": one}
            if _best_s(self._parts[0], inputs) > GAIN * _best_s(self._whole, inputs):
                return
            self._alone_below_tokens = tokens + 1

    def run(self, parts: Sequence[Inputs]) -> list[NDArray[np.float32]]:
        """
        Return the output of each of *parts*, `streams` at most, computed side by side.

        Inputs are copied into the runtime: sharing them with it corrupts its memory when shapes change.
        """
        alone = len(parts) == 1 and len(parts[0]["input_ids"]) == 1
        if len(parts) == 1 and not (alone and parts[0]["input_ids"].shape[1] < self._alone_below_tokens):
            return [np.array(self._whole.infer(parts[0], share_inputs=False)[0], dtype=np.float32)]
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


def _best_s(request: Any, inputs: Inputs) -> float:
    taken = []
    for _ in range(1 + REPEATS):
        started = time.monotonic()
        request.infer(inputs, share_inputs=False)
        taken.append(time.monotonic() - started)
    return min(taken[1:])
