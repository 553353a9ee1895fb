"""Files of common formats become documents that are short enough to embed."""

from tercet.ingest.chunking import Chunk, split
from tercet.ingest.readers import read_paths
from tercet.ingest.types import DocumentDict, IngestError, MetadataValue, TextFormat

__all__ = ["Chunk", "DocumentDict", "IngestError", "MetadataValue", "TextFormat", "read_paths", "split"]
