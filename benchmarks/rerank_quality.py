"""
`python -m benchmarks.rerank_quality DATA`: nDCG@10 of searches, with and without each part of reranking.

Real services over HTTP, with the default settings; what is indexed stays in build/, so that the next run need not embed it.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2

from benchmarks import machine
from benchmarks.rerank_runs import Run, ask, indexed, per_query
from benchmarks.rerank_servers import MAX_SIM, has_shipped_model
from benchmarks.rerank_sets import HELD_BACK, TESTED, JudgedSet, judged_sets
from benchmarks.rerank_tables import (
    DEFAULT,
    HYBRID,
    RRF,
    WITHOUT_BLEND,
    WITHOUT_FIRST,
    WITHOUT_LAST,
    Quality,
    report,
)
from benchmarks.servers import inherited
from services.rerank.settings import NONE, RerankSettings
from services.search.settings import SearchSettings
from tercet.client import TercetClient
from tercet.stack import LocalStack, Ports

WEIGHTS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DATA_DIR = machine.ROOT / "build" / "benchmarks" / "quality"
QUICK_QUERIES = 10
NAMES = (*TESTED, *HELD_BACK)

Variants = dict[str, dict[str, str]]


def variants(model: str | None = None) -> Variants:
    """
    Return the reranker's settings by row: the default, and where that is a cascade also each of its stages alone.

    *model* is a cross-encoder to try in the default one's place, behind the usual first stage.
    """
    last = model or str(RerankSettings.model_fields["model"].default)
    made: Variants = {DEFAULT: {} if model is None else {"RERANK_MODEL": last, "RERANK_FIRST_STAGE": MAX_SIM}}
    if model is not None or has_shipped_model():
        made[WITHOUT_FIRST] = {"RERANK_MODEL": last, "RERANK_FIRST_STAGE": NONE}
        made[WITHOUT_LAST] = {"RERANK_MODEL": MAX_SIM, "RERANK_FIRST_STAGE": NONE}
    return made


async def evaluate(sets: Sequence[JudgedSet], left_out: dict[str, str], model: str | None) -> Quality:
    """Measure all rows on *sets*; those in *left_out* with the model there, which was trained without them."""
    quality = Quality(
        {each.name: _title(each, each.name in left_out) for each in sets},
        blend=float(SearchSettings.model_fields["rerank_blend"].default),
    )
    by_model: dict[str | None, list[JudgedSet]] = {}
    for each in sets:
        by_model.setdefault(left_out.get(each.name, model), []).append(each)
    for tried, group in by_model.items():
        for row, environ in variants(tried).items():
            await _measure(quality, row, environ, group)
    return quality


async def _measure(quality: Quality, row: str, environ: dict[str, str], sets: Sequence[JudgedSet]) -> None:
    """Measure *row* with a stack of its own, and with the default's also the rows without rerank."""
    print(f"Starting the services for: {row}", flush=True)
    stack = LocalStack(DATA_DIR, environ={**inherited(), **environ}, ports=Ports(0, 0, 0))
    async with stack, TercetClient(stack.url) as client:
        reranker = await _info(stack.urls["rerank"])
        names = ", ".join(each.name for each in sets)
        quality.facts.append(
            f"{row} ({names}): {reranker['model']}, {reranker['fingerprint']}, {reranker['runtime']}, {reranker['precision']}"
        )
        fingerprint = (await _info(stack.urls["embedding"]))["fingerprint"]
        for judged in sets:
            collection = await indexed(client, fingerprint, judged)
            if row == DEFAULT:
                for name, fields in ((RRF, {"fusion": "rrf"}), (HYBRID, {})):
                    _keep(quality, name, judged, await ask(client, collection, judged, rerank=False, **fields))
            run = await ask(client, collection, judged)
            _keep(quality, row, judged, run)
            _sweep(quality, row, judged, run)


def _keep(quality: Quality, row: str, judged: JudgedSet, run: Run) -> None:
    values = per_query(judged.qrels, run.ids())
    quality.values.setdefault(row, {})[judged.name] = values
    quality.ms.setdefault(row, {})[judged.name] = run.ms
    if run.degraded:
        quality.facts.append(f"{row}, {judged.name}: {run.degraded} answers were degraded")
    print(f"{judged.name}: {row}: nDCG@10 {fmean(values.values()):.4f}, {run.ms:.0f} ms a search", flush=True)


def _sweep(quality: Quality, row: str, judged: JudgedSet, run: Run) -> None:
    """Keep what other blends would give, and see that the default weight gives the order that was found."""
    for weight in sorted({*WEIGHTS, quality.blend}):
        values = per_query(judged.qrels, run.blended(weight, _last_stage_documents(row)))
        quality.blends.setdefault(row, {}).setdefault(weight, {})[judged.name] = fmean(values.values())
        if weight == 1.0 and row == DEFAULT:
            quality.values.setdefault(WITHOUT_BLEND, {})[judged.name] = values
    computed, found = quality.blends[row][quality.blend][judged.name], fmean(quality.values[row][judged.name].values())
    if abs(computed - found) > 1e-3:
        quality.facts.append(
            f"{row}, {judged.name}: computed from the stages' scores nDCG@10 is {computed:.4f}, and not {found:.4f}"
        )


def _last_stage_documents(row: str) -> int | None:
    """Return how many documents the last model of *row*'s cascade scores; None where there is no cascade."""
    if row != DEFAULT or not has_shipped_model():
        return None
    return int(RerankSettings.model_fields["last_stage_documents"].default)


async def _info(url: str) -> dict[str, Any]:
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        found: dict[str, Any] = (await http.get(f"{url}/info")).json()
        return found


def _title(judged: JudgedSet, is_left_out: bool) -> str:
    part = "" if judged.name in TESTED else ", left out" if is_left_out else ", held back"
    return f"{judged.name} ({len(judged.queries)}{part})"


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rerank_quality", description=(__doc__ or "").strip())
    parser.add_argument("data", type=Path, help="the folder with the sets")
    parser.add_argument("--only", action="append", choices=NAMES, help="evaluate on this set; may be given again")
    parser.add_argument("--queries", type=int, help="ask only the first so many queries of each set")
    parser.add_argument("--quick", action="store_true", help="a few queries, to see that all works; not for figures")
    parser.add_argument("--model", help="a cross-encoder to try in the default one's place")
    parser.add_argument(
        "--left-out",
        action="append",
        default=[],
        metavar="SET=MODEL",
        help="evaluate SET with a cross-encoder that was trained without it; may be given again",
    )
    parser.add_argument("--out", type=Path, help="the file to write, benchmarks/RERANK_QUALITY.md by default")
    parser.add_argument("--note", default="", help="what changed since the last figures")
    options = parser.parse_args(given)
    options.left_out = dict(pair.partition("=")[::2] for pair in options.left_out)
    if unknown := set(options.left_out) - set(NAMES):
        parser.error(f"--left-out: there is no set {', '.join(sorted(unknown))}")
    if options.quick:
        options.queries = options.queries or QUICK_QUERIES
    folder = DATA_DIR.parent if options.queries or options.only else machine.ROOT / "benchmarks"
    options.out = options.out or folder / "RERANK_QUALITY.md"
    return options


def main(given: Sequence[str]) -> int:
    """Evaluate, print, and write the report."""
    options = _arguments(given)
    sets = judged_sets(options.data, options.only or NAMES)
    if options.queries:
        sets = [each.first(options.queries) for each in sets]
    if not sets:
        print(f"There is nothing to evaluate on in {options.data}")
        return 1
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    quality = asyncio.run(evaluate(sets, options.left_out, options.model))
    text = report(
        quality,
        commit=machine.commit(),
        machine=machine.describe(),
        command=shlex.join(["python", "-m", "benchmarks.rerank_quality", *given]),
        note=options.note,
    )
    options.out.write_text(text)
    print(text)
    print(f"Written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
