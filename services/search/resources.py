"""What the search service's routes work with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.http_client import ServiceClient
from services.search.catalog import Catalog
from services.search.indexing import Indexing
from services.search.pipeline import SearchPipeline
from services.search.ports import ResultCache


@dataclass(frozen=True, slots=True)
class SearchResources:
    """The use cases, and the parts whose state `/status` tells."""

    catalog: Catalog
    indexing: Indexing
    pipeline: SearchPipeline
    cache: ResultCache
    cache_kind: str
    clients: Mapping[str, ServiceClient]

    def problems(self) -> Sequence[str]:
        """Nothing in this process can die alone: readiness depends on no peer."""
        return []
