"""What the search service's routes work with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.http_client import ServiceClient
from services.search.catalog import Catalog
from services.search.changes import Changes
from services.search.indexing import Indexing
from services.search.ingest import Ingest
from services.search.pipeline import SearchPipeline
from services.search.ports import ResultCache, Retriever
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
    cache: ResultCache
    cache_kind: str
    clients: Mapping[str, ServiceClient]

    def problems(self) -> Sequence[str]:
        """Nothing in this process can die alone: readiness depends on no peer."""
        return []
