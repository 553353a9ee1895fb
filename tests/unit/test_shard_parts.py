"""The smaller parts of a shard: ids, the store, turns, claims and files."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import apsw
import pytest
from pyroaring import BitMap

from services.common.errors import Conflict
from services.search.claim import Claim
from services.search.shards import files
from services.search.shards.files import Damaged
from services.search.shards.ids import IdArena
from services.search.shards.store import ShardStore, StoreMark
from services.search.shards.threads import Turns
from tests.contract.shard_contract import put

IDS = ["a", "", "ид/1", "🙂" * 20, "d" * 500]


def test_ids_come_back_by_row():
    """Whatever characters they have and in whatever order they are asked for; rows passed over have none."""
    arena = IdArena()
    arena.extend(0, IDS)
    arena.extend(8, ["later"])
    assert len(arena) == 9
    assert arena.get([8, 3, 0, 6, 2]) == ["later", IDS[3], "a", "", IDS[2]]
    with pytest.raises(ValueError, match="row 3"):
        arena.extend(3, ["again"])


def test_ids_outlive_a_freeze():
    """What is loaded has the same ids and goes on growing; what is cut off is refused."""
    arena = IdArena()
    assert len(IdArena.load(arena.freeze())) == 0
    arena.extend(0, IDS)
    frozen = arena.freeze()
    loaded = IdArena.load(frozen)
    loaded.extend(len(IDS), ["more"])
    assert loaded.get(range(6)) == [*IDS, "more"]
    for length in (0, 7, 20, len(frozen) - 1):
        if length:
            with pytest.raises(Damaged):
                IdArena.load(frozen[:length])


def test_ids_take_little_memory():
    """A document's id costs its letters and eight bytes."""
    arena = IdArena()
    for start in range(0, 100_000, 500):
        arena.extend(start, [f"document-{row:08d}" for row in range(start, start + 500)])
    assert arena.memory_bytes == 100_000 * (17 + 8)


def stored(store, first_row, documents, *, removed=()):
    """Store *documents* and commit."""
    operations = [(seq, put(seq, id, text).document) for seq, id, text in documents]
    store.replace(removed, first_row, operations)
    store.commit(max(seq for seq, _, _ in documents))


def test_the_store_sees_only_what_was_committed(tmp_path):
    """Readers see nothing of a replacement before its commit, and nothing at all after a rollback."""
    store = ShardStore(tmp_path)
    stored(store, 0, [(1, "a", "one")])
    store.replace([0], 1, [(2, put(2, "a", "two").document)])
    assert [document.text for document in store.fetch(["a"]).values()] == ["one"]
    store.rollback()
    assert list(store.fetch(["a"])) == [0]
    with pytest.raises(apsw.ConstraintError):
        store.replace([], 1, [(2, put(2, "a", "twice").document)])
    stored(store, 1, [(2, "a", "two")], removed=[0])
    assert {row: document.text for row, document in store.fetch(["a", "a"]).items()} == {1: "two"}
    assert store.mark.seq == 2
    store.close()


def test_the_store_is_known_again(tmp_path):
    """Its mark outlives closing; another store, an older one or none is damage."""
    with pytest.raises(Damaged, match="missing"):
        ShardStore(tmp_path, expected=StoreMark("x", 0))
    store = ShardStore(tmp_path)
    stored(store, 0, [(5, "a", "one"), (7, "b", "two")])
    mark = store.mark
    store.close()
    store = ShardStore(tmp_path, expected=StoreMark(mark.token, 6))
    assert store.mark == mark
    assert list(store.rows()) == [0, 1]
    store.keep_only(BitMap([0]), 1, StoreMark(mark.token, 5))
    assert list(store.rows()) == [0]
    store.close()
    for expected in (mark, StoreMark("another", 0)):
        with pytest.raises(Damaged, match="not the store"):
            ShardStore(tmp_path, expected=expected)
    (tmp_path / "store.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(Damaged, match="cannot be read"):
        ShardStore(tmp_path, expected=StoreMark(mark.token, 0))


def test_a_checkpoint_brings_the_log_into_the_file(tmp_path):
    """Afterwards the file alone, without its log, has everything."""
    (tmp_path / "a").mkdir()
    store = ShardStore(tmp_path / "a")
    stored(store, 0, [(1, "a", "one")])
    store.checkpoint()
    copy = tmp_path / "b"
    copy.mkdir()
    (copy / "store.sqlite").write_bytes((tmp_path / "a" / "store.sqlite").read_bytes())
    again = ShardStore(copy, expected=store.mark)
    assert list(again.rows()) == [0]
    again.close()
    store.close()


def test_turns_keep_their_order_and_never_overlap():
    """However many threads the pool has, a shard's writes run one at a time as they came, failures among them."""
    with ThreadPoolExecutor(4) as pool:
        turns = Turns(pool)
        busy = threading.Lock()
        done = []

        def work(number):
            assert busy.acquire(blocking=False)
            done.append(number)
            busy.release()
            if number % 7 == 0:
                raise RuntimeError(str(number))
            return number

        futures = [turns.submit(lambda number=number: work(number)) for number in range(200)]
        results = [future.exception() or future.result() for future in futures]
    assert done == list(range(200))
    assert [result for result in results if isinstance(result, int)] == [n for n in range(200) if n % 7]
    with pytest.raises(RuntimeError):
        turns.submit(lambda: None)


def test_a_turn_that_was_cancelled_is_passed_over():
    """What waits may be cancelled; what comes after it runs."""
    with ThreadPoolExecutor(1) as pool:
        turns = Turns(pool)
        go = threading.Event()
        first = turns.submit(go.wait)
        second, third = turns.submit(lambda: 2), turns.submit(lambda: 3)
        assert second.cancel()
        go.set()
        assert (first.result(), third.result()) == (True, 3)


def test_a_claim_is_exclusive_until_it_is_released(tmp_path):
    """The second is told which process has the directory; after a release there is a second."""
    claim = Claim(tmp_path / "x")
    with pytest.raises(Conflict, match=str(os.getpid())):
        Claim(tmp_path / "x")
    claim.release()
    Claim(tmp_path / "x").release()


def test_altered_files_are_found(tmp_path):
    """A file that is gone, has another length or another content is damaged; an unchanged one is not."""
    path = tmp_path / "f"
    files.write_file(path, b"content")
    digest = sha256(b"content").hexdigest()
    files.check_file(path, 7, digest)
    for data in (b"conten", b"Content", b""):
        path.write_bytes(data)
        with pytest.raises(Damaged):
            files.check_file(path, 7, digest)
    path.unlink()
    for read in (files.read_file, files.sha256_of, lambda path: files.check_file(path, 7, digest)):
        with pytest.raises(Damaged):
            read(path)


def test_removing_takes_all_that_is_below(tmp_path):
    """Files and directories go; a link goes and what it names stays; nothing is no error."""
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "kept").write_text("x")
    (tmp_path / "d" / "e" / "f").write_text("x")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "kept")
    files.remove(tmp_path / "d")
    files.remove(tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_where_there_are_no_hard_links_files_are_copied(tmp_path):
    """A file system without them costs space, and nothing else; other failures stay failures."""

    class Linkless(files.Disk):
        def __init__(self, error):
            self.error = error

        def link(self, source, target):
            raise OSError(self.error, "no")

    (tmp_path / "a").write_bytes(b"x")
    with files.replaced_by(Linkless(errno.EPERM)):
        files.hard_link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x"
    with files.replaced_by(Linkless(errno.ENOSPC)), pytest.raises(OSError, match="no"):
        files.hard_link(tmp_path / "a", tmp_path / "c")
