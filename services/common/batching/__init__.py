"""
The batcher that both model services use.

    submit ── admission ── tokenizer threads ── lane queues ── token-budgeted batches ── one inference worker ── callers

`queue.py` decides what goes into the next batch, `batcher.py` runs it and hands the results out.
"""

from services.common.batching.batcher import Batcher, BatchObservation, Engine, Submission
from services.common.batching.queue import Lane

__all__ = ["BatchObservation", "Batcher", "Engine", "Lane", "Submission"]
