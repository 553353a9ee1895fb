"""
The machine's limit: how fast it multiplies all-MiniLM-L6-v2's own matrices in bf16, and nothing else.

Per token, six layers of four [384 × 384] (query, key, value, output), one [384 × 1536] and one [1536 × 384]; attention's own
products, normalisation and tokenisation are left out, so no encoder of this model can reach 100 % of it. torch (oneDNN)
does the multiplying with all cores, at 16 texts of 130 tokens at a time. `python -m benchmarks.gemm` prints one run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from benchmarks.machine import ROOT

LAYERS = 6
SHAPES = ((384, 384), (384, 384), (384, 384), (384, 384), (384, 1536), (1536, 384))
TEXTS = 16
TOKENS = 130
WARM_UP_PASSES = 3


@dataclass(frozen=True, slots=True)
class Limit:
    """Texts of 130 tokens per second, by the median pass and by the fastest, and the arithmetic behind it."""

    texts_per_s: float
    best_texts_per_s: float
    gflop_per_s: float
    passes: int


def flop_per_text() -> int:
    """Return the floating-point operations (a multiply and an add are two) of one text's matrix products."""
    return 2 * TOKENS * LAYERS * sum(rows * columns for rows, columns in SHAPES)


def measure(duration_s: float) -> Limit:
    """Multiply in this process for *duration_s*."""
    import torch

    inputs = {rows: torch.randn(TEXTS * TOKENS, rows).to(torch.bfloat16) for rows, _ in SHAPES}
    weights = [torch.randn(columns, rows).to(torch.bfloat16) for _ in range(LAYERS) for rows, columns in SHAPES]
    times_s: list[float] = []
    with torch.inference_mode():
        stop_at = time.perf_counter() + duration_s
        while time.perf_counter() < stop_at or len(times_s) < 2 * WARM_UP_PASSES:
            started = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            times_s.append(time.perf_counter() - started)
    counted = times_s[WARM_UP_PASSES:]
    texts_per_s = TEXTS / statistics.median(counted)
    return Limit(texts_per_s, TEXTS / min(counted), texts_per_s * flop_per_text() / 1e9, len(counted))


def measure_apart(duration_s: float) -> Limit:
    """Multiply in a process of its own, as a server would, for *duration_s*."""
    command = [sys.executable, "-m", "benchmarks.gemm", "--seconds", str(duration_s)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return Limit(**json.loads(ended.stdout))


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="Measure the bf16 GEMM limit at all-MiniLM-L6-v2's matrix shapes.")
    parser.add_argument("--seconds", type=float, default=2.0)
    print(json.dumps(asdict(measure(parser.parse_args().seconds))))


if __name__ == "__main__":
    main()
