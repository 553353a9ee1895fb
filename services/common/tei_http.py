"""What every service that speaks TEI's dialect answers alike: health, the headers that tell the cost, names of precisions."""

import time

from fastapi import APIRouter, Request, Response

from services.common.app import service_of
from services.common.errors import NotReady

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_health(router: APIRouter) -> None:
    """Give *router* the addresses at which a TEI answers whether requests can be served."""

    @router.get("/health", summary="TEI: 200 with an empty body, or 503")
    @router.get("", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    async def health(request: Request) -> Response:
        """Answer 200 while requests can be served."""
        reasons = service_of(request).not_ready_because()
        if reasons:
            raise NotReady(f"unhealthy: {', '.join(reasons)}")
        return Response()


def cost_headers(
    started: float,
    *,
    on_cpu: bool,
    characters: int,
    tokens: int,
    tokenization_ms: float,
    queue_ms: float,
    inference_ms: float,
) -> dict[str, str]:
    """
    Return TEI's headers: what was computed, and where the time went since *started*, in whole milliseconds.

    *started* is of `time.perf_counter`.
    """
    total_ms = str(int((time.perf_counter() - started) * 1000))
    return {
        "x-compute-type": f"{'cpu' if on_cpu else 'gpu'}+optimized",
        "x-compute-time": total_ms,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(tokens),
        "x-total-time": total_ms,
        "x-tokenization-time": str(int(tokenization_ms)),
        "x-queue-time": str(int(queue_ms)),
        "x-inference-time": str(int(inference_ms)),
    }
