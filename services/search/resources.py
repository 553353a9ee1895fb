"""What the search service's routes work with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.admission import Admission
from services.common.http_client import ServiceClient
from services.search.batches import Batches
from services.search.catalog import Catalog
from services.search.changes import Changes
from services.search.indexing import Indexing
from services.search.ingest import Ingest
from services.search.kept_answers import KeptAnswers
from services.search.pipeline import SearchPipeline
from services.search.ports import Retriever
from services.search.reindexing import Reindexing


@dataclass(frozen=True, slots=True)
class SearchResources:
    """The use cases, and the parts whose state `/status` tells."""

    catalog: Catalog
    indexing: Indexing
    ingest: Ingest
    changes: Changes
    reindexing: Reindexing
    retriever: Retriever
    pipeline: SearchPipeline
    batches: Batches
    cache: KeptAnswers
    cache_kind: str
    cache_layers: Callable[[], Mapping[str, Any]]
    admission: Admission
    clients: Mapping[str, ServiceClient]

    def problems(self) -> Sequence[str]:
        """Nothing in this process can die alone: readiness depends on no peer."""
        return []
