"""
The batcher that both model services use.

    submit ── admission ── tokenizer threads ── lane queues ── token-budgeted batches ── one inference worker ── callers

`engine.py` is what a model has to offer, `batcher.py` the event loop's side: it lets submissions in, joins those that want
the same (`submission.py`) and hands results out. `preparation.py` tokenises, `queue.py` decides whose turn it is and
`packing.py` what else goes into that batch, or `urgency.py` where not all can be done in time. `worker.py` runs it, `cost.py`
knows how long it takes (`calibration.py` measures), `turn.py` shares a device between models, `metrics.py` reports.
"""

from services.common.batching.batcher import Batcher
from services.common.batching.cost import CostModel
from services.common.batching.engine import BatchObservation, Engine, Submission
from services.common.batching.queue import Lane
from services.common.batching.turn import DeviceTurn

__all__ = ["BatchObservation", "Batcher", "CostModel", "DeviceTurn", "Engine", "Lane", "Submission"]
