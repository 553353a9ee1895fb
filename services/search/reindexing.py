"""Copies a collection into another one from the ledger, with other settings, while the old one serves and is written to."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from services.common.deadline import Deadline
from services.common.errors import Conflict, InvalidInput, NotFound, Overloaded, TercetError, Unavailable
from services.search.catalog import OWN_VECTORS, Catalog, CollectionSettings, differences
from services.search.documents import canonical, content_hash, embedded_hash, model_text, own_vector
from services.search.indexing import embed
from services.search.kinds import check_metadata
from services.search.ports import (
    NO_DOCUMENT,
    AttributeKind,
    Collection,
    EmbeddingClient,
    KnownDocument,
    Ledger,
    LedgerDocument,
    Metric,
    Operation,
    Receipt,
    Retriever,
    Vector,
)

COPY_BATCH = 256
BATCH_DEADLINE_S = 300.0
APPLY_WAIT_S = 60.0
SETTLE_S = 2.0  # Twice as long as another process may keep an alias: its last writes come to the old collection.
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
MARK = "copy"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """Into which collection, with which settings where they are to differ, and which alias is to mean it in the end."""

    target: str
    model: str | None = None
    shards: int | None = None
    metric: Metric | None = None
    attributes: Mapping[str, AttributeKind] | None = None
    language: str | None = None
    alias: str | None = None


@dataclass(slots=True)
class CopyProgress:
    """How a copy stands: up to operation *position* of the source's *source_seq*; *trouble* is what it waits for."""

    source: str
    target: str
    alias: str | None = None
    state: Literal["copying", "done", "failed", "cancelled"] = "copying"
    position: int = 0
    source_seq: int = 0
    copied: int = 0
    unchanged: int = 0
    embedded: int = 0
    deleted: int = 0
    refused: int = 0
    trouble: str | None = None


class Reindexing:
    """The copies that this process makes, each a task in the background; by the name of the target."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
        *,
        settle_s: float = SETTLE_S,
    ) -> None:
        """Follow the source for *settle_s* after the alias was switched, for writers that did not know of it yet."""
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._settle_s = settle_s
        self._copies: dict[str, tuple[CopyProgress, asyncio.Task[None]]] = {}

    async def start(self, source_name: str, asked: CopyRequest, deadline: Deadline) -> CopyProgress:
        """
        Begin to copy, or go on with a copy that a crash or an error has ended; returns at once.

        Raises:
            Conflict: The target has other settings than asked for, or documents that are not of this copy; it is being
                made already; or the alias is a collection's name.
            NotFound: There is no such source or model.
            InvalidInput: The target is the source, or the model is missing where documents brought their own vectors.
        """
        source = await self._catalog.get(source_name)
        if asked.target in self._copies and not self._copies[asked.target][1].done():
            raise Conflict(f"{asked.target!r} is being copied into already", param="target")
        if asked.alias is not None:
            named = await self._catalog.find(asked.alias)
            if named is not None and named.name == asked.alias:
                raise Conflict(f"{asked.alias!r} is a collection, not an alias", param="alias")
        target = await self._target(source, asked, deadline)
        progress = CopyProgress(source.name, target.name, asked.alias)
        copy = _Copy(source, target, progress, self._catalog, self._ledger, self._retriever, self._embedding)
        self._copies[target.name] = progress, asyncio.create_task(copy.run(self._settle_s))
        return progress

    def progress(self, target: str) -> CopyProgress:
        """Return how the copy into *target* stands. Raises NotFound where this process has made none."""
        found = self._copies.get(target)
        if found is None:
            raise NotFound(
                f"This process has no copy into {target!r}; start it again to go on with one", param="target"
            )
        return found[0]

    async def cancel(self, target: str) -> CopyProgress:
        """Stop the copy into *target*; what was copied stays. Raises NotFound."""
        progress = self.progress(target)
        await _stop(self._copies[target][1])
        if progress.state == "copying":  # It had not begun.
            progress.state = "cancelled"
        return progress

    async def aclose(self) -> None:
        """Stop all copies; each can be started again."""
        for _, task in self._copies.values():
            await _stop(task)

    async def _target(self, source: Collection, asked: CopyRequest, deadline: Deadline) -> Collection:
        found = await self._catalog.find(asked.target)
        if found is not None and found.uuid == source.uuid:
            raise InvalidInput("target: must be another collection than the source", param="target")
        model = asked.model or source.model
        wanted = CollectionSettings(
            model=model,
            dim=source.dim if model is None else None,
            shards=asked.shards or source.shards,
            metric=asked.metric or source.metric,
            attributes=asked.attributes if asked.attributes is not None else source.attributes,
            language=asked.language or source.language,
        )
        if found is None:
            found = await self._catalog.create(asked.target, wanted, deadline)
        elif others := differences(found, wanted):
            raise Conflict(f"The collection {found.name!r} has {'; '.join(others)}", param="target")
        await self._mark(source, found)
        return found

    async def _mark(self, source: Collection, target: Collection) -> None:
        """Remember in the ledger that *target* is a copy of *source*, so that nobody else's documents are removed."""
        serving = [alias for alias, name in (await self._catalog.aliases()).items() if name == target.name]
        if serving:
            raise Conflict(
                f"{target.name!r} serves already, as {', '.join(serving)}: name another target", param="target"
            )
        digest = source.uuid.encode()
        mark = await self._ledger.find_receipt(target.uuid, MARK)
        if mark is None and (await self._ledger.state(target.uuid)).documents == 0:
            await self._ledger.append(target.uuid, [], receipt=Receipt(MARK, digest, source.name.encode()))
        elif mark is None or mark.digest != digest:
            raise Conflict(
                f"The collection {target.name!r} holds documents that are not a copy of {source.name!r}: name another "
                "target, or delete it",
                param="target",
            )


class _Copy:
    """One copy under way."""

    def __init__(
        self,
        source: Collection,
        target: Collection,
        progress: CopyProgress,
        catalog: Catalog,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
    ) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._target_seq = 0
        self._own_from: int | None = None
        self._since: dict[str, int] = {}

    async def run(self, settle_s: float) -> None:
        """Copy until the target is as the source, switch the alias, and say in the progress how it ended."""
        progress = self._progress
        try:
            await self._sweep()
            await self._follow()
            await self._applied()
            if progress.alias is not None:
                # Writes to the target from here on are its own: the rest of the source's must not replace them.
                self._own_from = self._target_seq
                await self._catalog.set_aliases({progress.alias: self._target.name})
                await self._follow()
                await asyncio.sleep(settle_s)
                await self._follow()
            progress.state = "done"
        except asyncio.CancelledError:
            progress.state = "cancelled"
            raise
        except TercetError as error:
            progress.state, progress.trouble = "failed", error.message
            log.warning("reindex_failed", source=self._source.name, target=self._target.name, error=error.message)
        except Exception as error:
            progress.state, progress.trouble = "failed", type(error).__name__
            log.exception("reindex_failed", source=self._source.name, target=self._target.name)

    async def _sweep(self) -> None:
        """Remove what an earlier run copied and the source has no more: its log may have forgotten the deletion."""
        after = 0
        while operations := await self._ledger.operations_after(self._target.uuid, after, limit=COPY_BATCH):
            after = operations[-1].seq
            ids = [operation.id for operation in operations if operation.document is not None]
            present = await self._ledger.known(self._source.uuid, ids)
            gone = [id_ for id_ in ids if id_ not in present]
            if gone:
                await self._delete(gone, None)
        self._target_seq = max(self._target_seq, after)

    async def _follow(self) -> None:
        """Copy operations until there are none left."""
        progress = self._progress
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                operations = await self._ledger.operations_after(self._source.uuid, progress.position, limit=COPY_BATCH)
                progress.source_seq = (await self._ledger.state(self._source.uuid)).seq
                if not operations:
                    progress.position = max(progress.position, progress.source_seq)
                    return
                await self._copy(operations)
                progress.position = operations[-1].seq
                progress.trouble, pause_s = None, FIRST_PAUSE_S
            except (Overloaded, Unavailable) as error:
                progress.trouble = error.message
                await asyncio.sleep(max(pause_s, error.retry_after_s or 0.0))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _copy(self, operations: Sequence[Operation]) -> None:
        progress = self._progress
        known = await self._ledger.known(self._target.uuid, [operation.id for operation in operations])
        mine = [operation for operation in operations if self._may_replace(operation, known.get(operation.id))]
        documents = [made for made in map(self._fitted, mine) if made is not None]
        changed = [made for made in documents if not _same(made, known.get(made.id))]
        progress.unchanged += len(documents) - len(changed)
        stored = await self._with_vectors(changed, known)
        expected = None
        if self._own_from is not None:
            stands = {id_: found.seq for id_, found in known.items()}
            expected = {operation.id: stands.get(operation.id, NO_DOCUMENT) for operation in mine}
        if stored:
            guard = None if expected is None else {made.id: expected[made.id] for made in stored}
            written = await self._ledger.append(self._target.uuid, stored, expected=guard)
            progress.copied += written.changed
            done = [made.id for made in stored if made.id not in written.conflicts]
            if self._own_from is not None:  # A transaction's operations follow one another without gaps.
                first = written.seq - len(done) + 1
                self._since |= {id_: first + place for place, id_ in enumerate(done)}
            self._told(written.seq)
        gone = [operation.id for operation in mine if operation.document is None and operation.id in known]
        if gone:
            await self._delete(gone, expected)

    def _may_replace(self, operation: Operation, known: KnownDocument | None) -> bool:
        """Whether the target's document is still what the copy made it."""
        if self._own_from is None or known is None or known.seq <= self._own_from:
            return True
        return self._since.get(operation.id) == known.seq

    async def _delete(self, ids: Sequence[str], expected: Mapping[str, int] | None) -> None:
        guard = None if expected is None else {id_: expected[id_] for id_ in ids}
        written = await self._ledger.delete(self._target.uuid, ids, expected=guard)
        self._progress.deleted += written.changed
        self._told(written.seq)

    def _told(self, seq: int) -> None:
        self._target_seq = max(self._target_seq, seq)
        self._retriever.notify(self._target, seq)

    def _fitted(self, operation: Operation) -> LedgerDocument | None:
        """Return the document as the target keeps it, its vector still the source's; None for one it cannot take."""
        document = operation.document
        if document is None:
            return None
        try:
            check_metadata(document.metadata, self._target.attributes)
            own = self._own(document)
        except InvalidInput as error:
            self._progress.refused += 1
            log.warning("reindex_refused", target=self._target.name, document=document.id, error=error.message)
            return None
        raw = b"" if own is None else own.tobytes()
        return replace(
            document,
            seq=0,
            vector=document.vector if own is None else own,
            content_hash=content_hash(document.text, document.title, canonical(document.metadata), raw),
            embedded_hash=embedded_hash(document.title, document.text, raw),
        )

    def _own(self, document: LedgerDocument) -> Vector | None:
        """Return the vector that the document brought, if it did and the target's are of the same making."""
        brought = document.embedded_hash != embedded_hash(document.title, document.text, b"")
        if not brought or self._source.fingerprint != self._target.fingerprint:
            return None
        return own_vector(document.vector.astype("<f4").tobytes(), self._target.dim, self._target.metric)

    async def _with_vectors(
        self, documents: Sequence[LedgerDocument], known: Mapping[str, KnownDocument]
    ) -> list[LedgerDocument]:
        """Return *documents* with the target's vectors: the source's, those that it has for the same text, or new ones."""
        if self._source.fingerprint == self._target.fingerprint or self._target.fingerprint == OWN_VECTORS:
            return list(documents)
        kept = {
            each.id: known[each.id].vector
            for each in documents
            if each.id in known and known[each.id].embedded_hash == each.embedded_hash
        }
        reads = {each.id: model_text(each.title, each.text) for each in documents if each.id not in kept}
        texts = list(dict.fromkeys(reads.values()))
        if texts:
            deadline = Deadline.after(BATCH_DEADLINE_S)
            made = dict(zip(texts, await embed(self._embedding, self._target, texts, deadline), strict=True))
            self._progress.embedded += len(texts)
            kept |= {id_: made[text] for id_, text in reads.items()}
        return [replace(each, vector=kept[each.id]) for each in documents]

    async def _applied(self) -> None:
        """Wait until searches of the target see all of the copy."""
        while not await self._retriever.wait_applied(self._target, self._target_seq, Deadline.after(APPLY_WAIT_S)):
            self._progress.trouble = "the target's shards have not applied the copy yet"
        self._progress.trouble = None


def _same(document: LedgerDocument, known: KnownDocument | None) -> bool:
    return known is not None and known.content_hash == document.content_hash


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
