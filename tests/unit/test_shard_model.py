"""A shard against a dictionary, through any order of writes, filters, maintenance, snapshots and restarts."""

import asyncio
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.search.filters import matches, parse_filter
from services.search.ports import ShardQuery
from services.search.shards.local import LocalShard
from services.search.shards.slices import ledger_slice
from tests.contract.shard_contract import DIM, TINY, a_collection, early_folds, gone, put, shard_threads, unit

IDS = st.sampled_from([f"d{number}" for number in range(25)])
WORDS = ("apple", "pear", "plum", "kiwi")
FILTERS = (
    {"n": {"$gte": 5}},
    {"color": "red"},
    {"$not": {"color": "red"}},
    {"color": {"$exists": True}, "n": {"$lt": 8}},
)


class Log:
    """The newest operation on each document, as a ledger keeps them."""

    def __init__(self):
        self.seq = 0
        self.operations = {}

    def add(self, operation):
        self.seq = operation.seq
        self.operations.pop(operation.id, None)
        self.operations[operation.id] = operation

    async def operations_after(self, uuid, seq, *, limit):
        return [operation for operation in self.operations.values() if operation.seq > seq][:limit]


class ShardMachine(RuleBasedStateMachine):
    """The shard has applied what the log had at some time; the dictionary is what that was."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.around = ExitStack()
        self.around.enter_context(early_folds())
        self.threads = self.around.enter_context(shard_threads())
        self.log = Log()
        self.snapshots = {0: {}}
        self.model = {}

    def run(self, work):
        return self.loop.run_until_complete(work)

    def open(self):
        return LocalShard.open(a_collection(shards=1), 0, self.directory, threads=self.threads, vectors=TINY)

    @initialize()
    def begin(self):
        """Open an empty shard."""
        self.shard = self.open()

    @rule(ids=st.lists(IDS, min_size=1, max_size=12), numbers=st.randoms(use_true_random=False))
    def write(self, ids, numbers):
        """Store or replace documents."""
        for id in ids:
            metadata = {"n": numbers.randrange(10)}
            if numbers.random() < 0.5:
                metadata["color"] = numbers.choice(["red", "blue"])
            text = " ".join(numbers.choices(WORDS, k=3))
            vector = unit(1, *(numbers.random() for _ in range(DIM - 1)))
            self.log.add(put(self.log.seq + 1, id, text, vector=vector, **metadata))

    @rule(ids=st.lists(IDS, min_size=1, max_size=5))
    def delete(self, ids):
        """Delete documents, or what is no document."""
        for id in ids:
            self.log.add(gone(self.log.seq + 1, id))

    @rule(limit=st.integers(1, 30))
    def follow(self, limit):
        """Apply some of what is new, and something old with it."""
        seq = self.shard.applied_seq
        page = self.run(self.log.operations_after("", max(0, seq - 3), limit=limit))
        upto = page[-1].seq if page else seq
        self.run(self.shard.apply(page, upto))
        for operation in page:
            if operation.seq > seq:
                self.model.pop(operation.id, None)
                if operation.document is not None:
                    self.model[operation.id] = operation

    @rule(idle=st.booleans())
    def maintain(self, idle):
        """Do a piece of what is due."""
        self.run(self.shard.maintain(idle=idle))

    @rule()
    def snapshot(self):
        """Write a snapshot."""
        assert self.run(self.shard.snapshot("e")) == self.shard.applied_seq

    @rule(snapshot=st.booleans())
    def restart(self, snapshot):
        """Close and open again; what was applied after the last snapshot is applied again."""
        if snapshot:
            self.run(self.shard.snapshot("e"))
        seq = self.shard.applied_seq
        self.run(self.shard.aclose())
        self.shard = self.open()
        assert self.shard.problems == []
        assert self.shard.applied_seq == seq if snapshot else self.shard.applied_seq <= seq
        missing = [operation for operation in self.log.operations.values() if operation.seq > self.shard.applied_seq]
        self.run(self.shard.apply(missing, self.log.seq))
        self.model = {id: operation for id, operation in self.log.operations.items() if operation.document is not None}

    @precondition(lambda self: self.model)
    @rule(filter=st.sampled_from(FILTERS), words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=2))
    def search(self, filter, words):
        """Both retrievers return what the dictionary has, with the scores it has."""
        expression = parse_filter(filter)
        vector = unit(1, 1)
        terms = [{"apple": "appl"}.get(word, word) for word in words]
        answer = self.run(self.shard.search(ShardQuery(50, vector, terms, filter=expression, exact=True)))
        expected = {id for id, op in self.model.items() if matches(expression, op.document.metadata)}
        assert {candidate.id for candidate in answer.candidates} == expected
        for candidate in answer.candidates:
            document = self.model[candidate.id].document
            assert abs(candidate.dense - float(document.vector @ vector)) < 1e-5
            assert (candidate.bm25 is not None) == any(word in document.text for word in words)

    @rule()
    def audit(self):
        """The shard is what the ledger says, as far as it has applied it."""
        report = self.run(self.shard.audit(ledger_slice(self.log, a_collection(shards=1), 0), repair=False))
        assert report.differences == {}

    @invariant()
    def it_has_what_the_dictionary_has(self):
        """Ids, texts, vectors and operation numbers."""
        if not hasattr(self, "shard"):
            return
        assert self.shard.documents == len(self.model)
        found = self.run(self.shard.fetch([f"d{number}" for number in range(25)], vectors=True))
        assert {id: (document.text, document.seq) for id, document in found.items()} == {
            id: (operation.document.text, operation.seq) for id, operation in self.model.items()
        }
        for id, document in found.items():
            np.testing.assert_array_equal(document.vector, self.model[id].document.vector)

    def teardown(self):
        """Close it."""
        if hasattr(self, "shard"):
            self.run(self.shard.aclose())
        self.around.close()
        self.loop.close()
        shutil.rmtree(self.directory)


TestShardAgainstADictionary = ShardMachine.TestCase
TestShardAgainstADictionary.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
