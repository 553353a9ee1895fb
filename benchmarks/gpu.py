"""
Row 7, where there is a CUDA device: fp16 through HTTP beside plain sentence-transformers fp16 in this process.

`python -m benchmarks.gpu` runs it alone, on another machine too: it needs Tercet's own environment and no peers.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.figures import ratio, spread
from benchmarks.load import LoadFailed, Stretch, send
from benchmarks.machine import commit, describe
from benchmarks.report import Row, append, section
from benchmarks.servers import Running, ServerFailed, model_directory, running, tercet
from benchmarks.texts import SHORT_TOKENS, mixed_texts, texts

CONNECTIONS = 8
TEXTS = 64
REQUESTS = 2_000
HTTP, IN_PROCESS = "tercet fp16, HTTP", "sentence-transformers fp16, in process"
SKIPPED = "Skipped: torch sees no CUDA device here."


def gpu(effort: Effort, directory: Path) -> Row:
    """Batches of 64 texts through HTTP beside the same batches given to sentence-transformers directly."""
    import torch

    duration_s = effort.seconds(8, least=2)
    row = Row(
        "gpu",
        "GPU: fp16, 64 texts per request",
        f"{effort.rounds} rounds of {duration_s:g} s in turn; {CONNECTIONS} connections of the asyncio client, vectors "
        "as base64, beside `SentenceTransformer.half().encode` of the same requests, one after the other. "
        "To reach: ≥ 90 % at short texts, ≥ 1.5× at mixed lengths.",
        ("lengths", "HTTP texts/s", "in-process texts/s", "HTTP / in-process", "HTTP request p50 ms"),
    )
    if not torch.cuda.is_available():
        row.findings.append(SKIPPED)
        return row
    row.findings.append(f"device: {torch.cuda.get_device_name()}")
    encode = _in_process(torch)
    environ = {"EMBEDDING_DEVICE": "cuda", "EMBEDDING_PRECISION": "fp16", "EMBEDDING_CACHE_BYTES": "0"}
    with running([tercet(**environ)], directory) as servers:
        (server,) = servers.values()
        kinds = {f"{SHORT_TOKENS} tokens": texts(TEXTS * REQUESTS, SHORT_TOKENS, 500)}
        kinds["6 to 250 tokens, mixed"] = mixed_texts(TEXTS * REQUESTS, 501)
        for lengths, made in kinds.items():
            requests = [made[start : start + TEXTS] for start in range(0, len(made), TEXTS)]
            _compare(row, lengths, requests, server, encode, effort.rounds, duration_s)
    return row


def _compare(
    row: Row,
    lengths: str,
    requests: Sequence[Sequence[str]],
    server: Running,
    encode: Callable[[Sequence[str]], None],
    rounds: int,
    duration_s: float,
) -> None:
    stretch = Stretch(CONNECTIONS, duration_s)
    through_http, in_process, p50_ms = [], [], []
    for turn in range(rounds + 1):  # The first round warms both up and is not counted.
        server.resume()
        result = send(server, requests, stretch, repeat=True, fields={"encoding": "base64"}).result()
        server.pause()
        rate = _encode_rate(encode, requests, duration_s)
        if turn:
            through_http.append(result.per_s * TEXTS)
            in_process.append(rate)
            p50_ms.append(result.p50_ms)
    share = ratio(through_http, in_process)
    row.lines.append((lengths, str(spread(through_http)), str(spread(in_process)), f"{share}×", str(spread(p50_ms))))
    row.bars[f"texts/s, {lengths}"] = {HTTP: spread(through_http), IN_PROCESS: spread(in_process)}


def _in_process(torch: Any) -> Callable[[Sequence[str]], None]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_directory()), device="cuda").half()

    def encode(batch: Sequence[str]) -> None:
        model.encode(list(batch), batch_size=TEXTS, show_progress_bar=False)
        torch.cuda.synchronize()

    return encode


def _encode_rate(
    encode: Callable[[Sequence[str]], None], requests: Sequence[Sequence[str]], duration_s: float
) -> float:
    started = time.perf_counter()
    done = 0
    while (elapsed_s := time.perf_counter() - started) < duration_s:
        encode(requests[done % len(requests)])
        done += 1
    return done * TEXTS / elapsed_s


def main() -> None:
    """Run this row alone and print it; with --out, add it to a RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--out", type=Path, help="directory whose RESULTS.md gets the section")
    parser.add_argument("--note", default="", help="what changed since the last figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as directory:
        try:
            row = gpu(QUICK if options.quick else FULL, Path(directory))
        except (LoadFailed, ServerFailed) as failure:
            raise SystemExit(f"gpu: {failure}") from None
    command = "python -m benchmarks.gpu" + (" --quick" if options.quick else "")
    text = section([row], commit=commit(), note=options.note, machine=describe(), command=command, plot=None)
    print(text)
    if options.out:
        append(options.out / "RESULTS.md", text)


if __name__ == "__main__":
    main()
