"""The vectors of one shard: growing rows, a flat tail, sealed segments whose kind follows their size."""

from services.search.shards.vectors.building import Built
from services.search.shards.vectors.index import VectorIndex
from services.search.shards.vectors.metrics import use_one_thread
from services.search.shards.vectors.planning import VectorOptions
from services.search.shards.vectors.tiers import Job
from services.search.shards.vectors.view import VectorAnswer, VectorView

__all__ = ["Built", "Job", "VectorAnswer", "VectorIndex", "VectorOptions", "VectorView", "use_one_thread"]
