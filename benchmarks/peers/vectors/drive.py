"""
Drives one vector database in the process: reads commands as JSON lines, answers with JSON lines.

Runs in the peers' own environment, so it imports nothing of ours. `load` takes vectors in batches; `search` asks one
question after the other and returns the rows found and each question's time. Each database is set up as its
documentation advises: an approximate index, and an index on the filtered fields where it has one.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BATCH = 1000


class Database(Protocol):
    """What the commands need of a database. A filter is a field and its value, or None."""

    def add(self, rows: range, vectors: Any) -> None:
        """Store *vectors* under the numbers *rows*, with the fields `tenth` and `hundredth`, durably."""
        ...

    def finish(self) -> None:
        """Build what searches need."""
        ...

    def search(self, vector: Any, limit: int, condition: tuple[str, int] | None) -> list[int]:
        """Return the rows found, best first."""
        ...


def fields(row: int) -> dict[str, int]:
    """Return the filtered fields of a row: each value of `tenth` has 10 % of the rows, each of `hundredth` 1 %."""
    return {"tenth": row * 7 % 10, "hundredth": row * 7 % 100}


class Chroma:
    """chromadb, persistent, its HNSW index with default settings."""

    def __init__(self, directory: Path, dim: int) -> None:
        import chromadb

        settings = chromadb.Settings(anonymized_telemetry=False)
        client = chromadb.PersistentClient(str(directory), settings=settings)
        self._collection = client.create_collection("rows", metadata={"hnsw:space": "ip"}, embedding_function=None)

    def add(self, rows: range, vectors: Any) -> None:
        self._collection.add(
            ids=[str(row) for row in rows], embeddings=vectors, metadatas=[fields(row) for row in rows]
        )

    def finish(self) -> None:
        return None

    def search(self, vector: Any, limit: int, condition: tuple[str, int] | None) -> list[int]:
        where = {condition[0]: condition[1]} if condition else None
        found = self._collection.query(query_embeddings=[vector], n_results=limit, where=where, include=[])
        return [int(row) for row in found["ids"][0]]


class Lance:
    """lancedb with IVF_HNSW_SQ and bitmap indexes on the fields, results refined with the full vectors."""

    def __init__(self, directory: Path, dim: int) -> None:
        import lancedb
        import pyarrow

        self._arrow = pyarrow
        self._schema = pyarrow.schema(
            [("row", pyarrow.int64()), ("vector", pyarrow.list_(pyarrow.float32(), dim))]
            + [(name, pyarrow.int64()) for name in fields(0)]
        )
        self._table = lancedb.connect(str(directory)).create_table("rows", schema=self._schema)

    def add(self, rows: range, vectors: Any) -> None:
        columns = {name: [fields(row)[name] for row in rows] for name in fields(0)}
        flat = self._arrow.array(vectors.reshape(-1))
        wide = self._arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        self._table.add(self._arrow.table({"row": list(rows), "vector": wide, **columns}, schema=self._schema))

    def finish(self) -> None:
        self._table.create_index(metric="dot", index_type="IVF_HNSW_SQ", num_partitions=1)
        for name in fields(0):
            self._table.create_scalar_index(name, index_type="BITMAP")
        self._table.optimize()

    def search(self, vector: Any, limit: int, condition: tuple[str, int] | None) -> list[int]:
        query = self._table.search(vector).distance_type("dot").limit(limit).refine_factor(4).select(["row"])
        if condition:
            query = query.where(f"{condition[0]} = {condition[1]}", prefilter=True)
        rows: list[int] = query.to_arrow()["row"].to_pylist()
        return rows


class Milvus:
    """milvus-lite with the index it chooses itself (AUTOINDEX)."""

    def __init__(self, directory: Path, dim: int) -> None:
        from pymilvus import DataType, MilvusClient

        directory.mkdir(parents=True, exist_ok=True)
        self._client = MilvusClient(str(directory / "milvus.db"))
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        for name in fields(0):
            schema.add_field(name, DataType.INT64)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
        self._client.create_collection("rows", schema=schema, index_params=index)

    def add(self, rows: range, vectors: Any) -> None:
        self._client.insert(
            "rows", [{"row": row, "vector": vector, **fields(row)} for row, vector in zip(rows, vectors, strict=True)]
        )

    def finish(self) -> None:
        self._client.flush("rows")
        self._client.load_collection("rows")

    def search(self, vector: Any, limit: int, condition: tuple[str, int] | None) -> list[int]:
        where = f"{condition[0]} == {condition[1]}" if condition else ""
        (found,) = self._client.search("rows", data=[vector], limit=limit, filter=where)
        return [int(hit["row"]) for hit in found]


KINDS: dict[str, Callable[[Path, int], Database]] = {"chroma": Chroma, "lancedb": Lance, "milvus-lite": Milvus}


def main() -> None:
    """Obey the commands on standard input until it ends."""
    kind, directory, vectors_file, queries_file = sys.argv[1:]
    vectors, queries = np.load(vectors_file, mmap_mode="r"), np.load(queries_file)
    database: Database = KINDS[kind](Path(directory), vectors.shape[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # What a library prints is no answer.
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any]
        if command["do"] == "load":
            began = time.perf_counter()
            for first in range(0, command["rows"], BATCH):
                rows = range(first, min(first + BATCH, command["rows"]))
                database.add(rows, np.ascontiguousarray(vectors[rows.start : rows.stop]))
            loaded = time.perf_counter()
            database.finish()
            answer = {"load_s": loaded - began, "finish_s": time.perf_counter() - loaded}
        else:
            found, seconds = [], []
            condition = command["filter"]
            for number in command["queries"]:
                began = time.perf_counter()
                found.append(database.search(queries[number], command["limit"], condition and tuple(condition)))
                seconds.append(time.perf_counter() - began)
            answer = {"rows": found, "seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
