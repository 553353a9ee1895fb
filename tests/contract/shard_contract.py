"""What every shard does, in this process or behind a network: inherit `ShardContract` and say how one is made."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import pytest_asyncio

from services.common.errors import NotReady
from services.search.filters import parse_filter
from services.search.ports import Collection, LedgerDocument, Operation, Shard, ShardQuery
from services.search.shards.lexical import analyze
from services.search.shards.threads import ShardThreads, search_threads
from services.search.shards.vectors import VectorOptions

DIM = 8
MakeShard = Callable[[], Awaitable[Shard]]

# Segments so small that a handful of documents is sealed, merged and rebuilt.
TINY = VectorOptions(tail_rows=8, hnsw_rows=32, ivf_rows=96, max_segment_rows=128)


def a_collection(**changes):
    """Return a collection of dimension `DIM`."""
    values = {"uuid": "u1", "name": "c", "model": None, "fingerprint": "f", "dim": DIM, "shards": 4, "created_at": 0.0}
    return Collection(**(values | changes))


@contextmanager
def early_folds() -> Iterator[None]:
    """Let an idle lexical index fold its newest documents when they are a handful, until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.search.shards.lexical.index._FOLD_ROWS_WHEN_IDLE", 8)
        yield


@contextmanager
def shard_threads() -> Iterator[ShardThreads]:
    """Yield threads for shards to work in."""
    made = ShardThreads(search_threads(3), ThreadPoolExecutor(2), ThreadPoolExecutor(1), lambda: None)
    yield made
    for pool in (made.readers, made.writers, made.maintenance):
        pool.shutdown()


def unit(*numbers):
    """Return a unit vector that begins with *numbers*."""
    vector = np.zeros(DIM, np.float32)
    vector[: len(numbers)] = numbers
    return vector / np.linalg.norm(vector)


def put(seq, id, text="nothing", *, vector=None, title=None, **metadata):
    """Return the operation that stores a document."""
    vector = unit(1) if vector is None else vector
    return Operation(seq, id, LedgerDocument(id, text, title, metadata, vector, b"content", b"embedded"))


def gone(seq, id):
    """Return the operation that deletes a document."""
    return Operation(seq, id, None)


def lexical(words, *, limit=10, filter=None):
    """Return a query by words alone."""
    return ShardQuery(limit, terms=analyze(words), filter=parse_filter(filter))


def dense(*numbers, limit=10, filter=None):
    """Return a query by vector alone."""
    return ShardQuery(limit, vector=unit(*numbers), filter=parse_filter(filter))


async def found(shard, query):
    """Return the ids of the candidates."""
    return sorted(candidate.id for candidate in (await shard.search(query)).candidates)


class ShardContract:
    """The behaviour of a `Shard` of dimension `DIM`."""

    @pytest_asyncio.fixture
    async def make_shard(self) -> AsyncIterator[MakeShard]:
        """Yield a function that returns a new, empty shard; close what it made."""
        raise NotImplementedError
        yield

    @pytest_asyncio.fixture
    async def shard(self, make_shard):
        """Return an empty shard."""
        return await make_shard()

    async def test_an_empty_shard_finds_nothing(self, shard):
        """Without documents every query has an empty answer, true for operation 0."""
        for query in (dense(1), lexical("apple"), dense(1, filter={"a": 1}), ShardQuery(10)):
            answer = await shard.search(query)
            assert list(answer.candidates) == []
            assert answer.applied_seq == 0
            assert answer.shard == shard.number
        assert await shard.fetch(["a", ""]) == {}
        assert await shard.matching(None, limit=5) == []
        assert shard.documents == shard.applied_seq == 0

    async def test_what_was_applied_is_found_at_once(self, shard):
        """When `apply` has returned, a search finds the documents by vector and by words."""
        await shard.apply([put(1, "a", "red apple", vector=unit(1)), put(2, "b", "green pear", vector=unit(0, 1))], 2)
        assert await found(shard, lexical("apples")) == ["a"]
        answer = await shard.search(dense(1, 0.1, limit=1))
        assert [candidate.id for candidate in answer.candidates] == ["a"]
        assert (shard.documents, shard.applied_seq, answer.applied_seq) == (2, 2, 2)

    async def test_the_title_is_searched(self, shard):
        """A word that only the title has finds the document."""
        await shard.apply([put(1, "a", "text", title="Pomology"), put(2, "b", "text", title=None)], 2)
        assert await found(shard, lexical("pomology")) == ["a"]

    async def test_every_candidate_of_a_vector_query_has_its_exact_cosine(self, shard):
        """What only BM25 found has a dense score too; what only the vector found has no BM25 score."""
        near = [put(seq, f"near{seq}", "pear", vector=unit(1, seq / 100)) for seq in range(1, 6)]
        far = put(6, "far", "apple", vector=unit(-0.3, 1))
        await shard.apply([*near, far], 6)
        query = ShardQuery(3, vector=unit(1, 0.2), terms=analyze("apple"))
        candidates = {candidate.id: candidate for candidate in (await shard.search(query)).candidates}
        assert sorted(candidates) == ["far", "near3", "near4", "near5"]
        assert candidates["far"].dense == pytest.approx(float(unit(-0.3, 1) @ unit(1, 0.2)), abs=1e-6)
        assert candidates["far"].bm25 > 0
        assert candidates["near5"].bm25 is None
        assert candidates["near5"].dense == pytest.approx(float(unit(1, 0.05) @ unit(1, 0.2)), abs=1e-6)

    async def test_a_query_without_a_vector_has_no_dense_scores(self, shard):
        """Words alone give BM25 scores alone."""
        await shard.apply([put(1, "a", "apple")], 1)
        (candidate,) = (await shard.search(lexical("apple"))).candidates
        assert candidate.dense is None
        assert candidate.bm25 > 0

    async def test_the_limit_is_for_each_retriever(self, shard):
        """A query by vector and words brings at most the limit from each."""
        await shard.apply([put(seq, f"d{seq}", "apple", vector=unit(1, seq)) for seq in range(1, 51)], 50)
        assert len(await found(shard, dense(1, limit=7))) == 7
        assert len(await found(shard, lexical("apple", limit=7))) == 7
        both = await found(shard, ShardQuery(7, vector=unit(1), terms=analyze("apple")))
        assert 7 <= len(both) <= 14

    async def test_an_update_replaces_the_document_everywhere(self, shard):
        """Old words, old metadata, old vector and old text are gone."""
        await shard.apply([put(1, "a", "apple", vector=unit(1), lang="en")], 1)
        await shard.apply([put(2, "a", "pear", vector=unit(0, 1), lang="de")], 2)
        assert shard.documents == 1
        assert await found(shard, lexical("apple")) == []
        assert await found(shard, lexical("pear")) == ["a"]
        assert await found(shard, dense(1, filter={"lang": "en"})) == []
        assert await found(shard, dense(1, filter={"lang": "de"})) == ["a"]
        (new,) = (await shard.search(dense(1))).candidates
        assert new.dense == pytest.approx(0, abs=1e-6)
        documents = await shard.fetch(["a"])
        assert (documents["a"].text, documents["a"].seq) == ("pear", 2)

    async def test_a_deleted_document_is_gone(self, shard):
        """Neither retriever, filter nor fetch brings it back; deleting what is not there does no harm."""
        await shard.apply([put(1, "a", "apple", x=1), put(2, "b", "apple", x=1)], 2)
        await shard.apply([gone(3, "a"), gone(4, "unknown")], 4)
        assert shard.documents == 1
        for query in (
            dense(1),
            lexical("apple"),
            dense(1, filter={"x": 1}),
            dense(1, filter={"y": {"$exists": False}}),
        ):
            assert await found(shard, query) == ["b"]
        assert list(await shard.fetch(["a", "b"])) == ["b"]

    async def test_a_deleted_id_can_come_back(self, shard):
        """A document that was deleted and stored again is there once."""
        await shard.apply([put(1, "a", "apple"), gone(2, "a"), put(3, "a", "apple")], 3)
        await shard.apply([gone(4, "a")], 4)
        await shard.apply([put(5, "a", "apple")], 5)
        assert await found(shard, lexical("apple")) == ["a"]
        assert shard.documents == 1

    async def test_repeated_operations_change_nothing(self, shard):
        """Applying again what was applied, in whole or in part, leaves rows, counts and answers as they were."""
        first = [put(1, "a", "apple"), put(2, "b", "apple"), put(3, "a", "pear"), gone(4, "b"), put(5, "c", "plum")]
        await shard.apply(first, 5)
        before = (await shard.search(dense(1))).candidates
        for part in (first, first[:2], first[1:4], []):
            await shard.apply(part, 5)
        assert list((await shard.search(dense(1))).candidates) == list(before)
        assert (shard.documents, shard.applied_seq) == (2, 5)
        assert await found(shard, lexical("apple")) == []

    async def test_operations_that_it_has_applied_are_passed_over(self, shard):
        """What is numbered up to `applied_seq` changes nothing, even on documents the shard has not; the rest counts."""
        await shard.apply([put(7, "a", "new"), gone(8, "b")], 8)
        await shard.apply([put(3, "a", "old"), put(4, "b", "old"), put(8, "c", "late"), put(9, "d", "next")], 9)
        assert await found(shard, lexical("old late")) == []
        assert await found(shard, lexical("new next")) == ["a", "d"]
        await shard.apply([], 5)
        assert shard.applied_seq == 9

    async def test_the_newest_operation_of_a_page_holds(self, shard):
        """Of operations on one document in one call, the one with the highest number holds, in whatever order."""
        await shard.apply([put(3, "a", "new"), put(1, "a", "old"), gone(4, "b"), put(2, "b", "old")], 4)
        assert await found(shard, lexical("old new")) == ["a"]
        assert (await shard.fetch(["a", "b"]))["a"].text == "new"
        assert shard.documents == 1

    async def test_operations_for_other_slices_advance_the_shard(self, shard):
        """An apply without operations moves `applied_seq` alone."""
        await shard.apply([put(1, "a", "apple")], 1)
        await shard.apply([], 9)
        assert shard.applied_seq == 9
        assert (await shard.search(lexical("apple"))).applied_seq == 9

    async def test_a_filter_limits_both_retrievers(self, shard):
        """Only matching documents are candidates, and the best of them all are."""
        operations = [
            put(
                seq,
                f"d{seq}",
                "apple " * (1 + seq % 3),
                vector=unit(1, seq),
                year=1900 + seq,
                tags=["even", "odd"][seq % 2 :][:1],
            )
            for seq in range(1, 101)
        ]
        await shard.apply(operations, 100)
        condition = {"year": {"$gt": 1950, "$lte": 1960}, "tags": "even"}
        expected = sorted(f"d{seq}" for seq in range(52, 61, 2))
        assert await found(shard, dense(1, limit=20, filter=condition)) == expected
        assert await found(shard, lexical("apple", limit=20, filter=condition)) == expected
        assert await found(shard, dense(1, limit=2, filter=condition)) == ["d52", "d54"]

    async def test_a_filter_that_nothing_matches_gives_nothing(self, shard):
        """An unmatched filter is an empty answer, for unknown fields too."""
        await shard.apply([put(1, "a", "apple", lang="en")], 1)
        for condition in ({"lang": "fr"}, {"unknown": 1}, {"lang": {"$in": []}}):
            assert await found(shard, ShardQuery(5, unit(1), analyze("apple"), filter=parse_filter(condition))) == []

    async def test_a_filter_sees_later_writes(self, shard):
        """The rows of a filter are not remembered past a change."""
        query = dense(1, filter={"lang": "en"})
        await shard.apply([put(1, "a", lang="en")], 1)
        assert await found(shard, query) == ["a"]
        await shard.apply([put(2, "b", lang="en"), gone(3, "a")], 3)
        assert await found(shard, query) == ["b"]

    async def test_fetch_returns_the_stored_fields(self, shard):
        """Text, title and metadata come back as they were, and the vector when it is asked for."""
        metadata = {"s": "ü\u2028", "i": 2**63 - 1, "f": 0.1, "b": True, "l": ["x", ""], "e": []}
        text = 'line\nناقش 検索 🙂 "quoted" \'); DROP TABLE documents; --'
        await shard.apply([put(1, "ид/1", text, title="Títle", vector=unit(3, 4), **metadata)], 1)
        (document,) = (await shard.fetch(["ид/1"])).values()
        assert (document.id, document.text, document.title, document.vector) == ("ид/1", text, "Títle", None)
        assert document.metadata == metadata
        assert document.metadata["b"] is True
        (document,) = (await shard.fetch(["ид/1"], vectors=True)).values()
        np.testing.assert_array_equal(document.vector, unit(3, 4))

    async def test_ids_that_are_not_there_are_missing_from_a_fetch(self, shard):
        """Unknown ids are passed over and repeated ones come once; so it is for very many."""
        await shard.apply([put(seq, f"d{seq}", "apple") for seq in range(1, 101)], 100)
        assert list(await shard.fetch(["d1", "d1", "x", "'", ""], vectors=True)) == ["d1"]
        assert len(await shard.fetch([f"d{number}" for number in range(5000)])) == 100

    async def test_matching_lists_what_a_filter_selects(self, shard):
        """Up to the limit, with the operation that stored each, in an order that stays; None is every document."""
        await shard.apply([put(seq, f"d{seq}", n=seq) for seq in range(1, 21)], 20)
        await shard.apply([put(21, "d3", n=100), gone(22, "d4")], 22)
        condition = parse_filter({"n": {"$gte": 15}})
        matches = await shard.matching(condition, limit=100)
        assert {match.id: match.seq for match in matches} == {**{f"d{n}": n for n in range(15, 21)}, "d3": 21}
        assert await shard.matching(condition, limit=100) == matches
        assert await shard.matching(condition, limit=3) == matches[:3]
        assert len(await shard.matching(None, limit=100)) == 19

    async def test_facets_count_what_matches(self, shard):
        """Counts are over the documents that match the filter, and the words where there are any, not over the hits."""
        operations = [
            put(seq, f"d{seq}", "apple" if seq % 2 else "pear", lang=["en", "de", "fr"][seq % 3], n=seq)
            for seq in range(1, 31)
        ]
        await shard.apply([*operations, gone(31, "d30")], 31)
        query = ShardQuery(1, vector=unit(1), facets={"lang": 2}, filter=parse_filter({"n": {"$gt": 6}}))
        assert (await shard.search(query)).facets == {"lang": {"de": 8, "fr": 8}}
        query = ShardQuery(1, terms=["appl"], facets={"lang": 5, "unknown": 5})
        assert (await shard.search(query)).facets == {"lang": {"de": 5, "en": 5, "fr": 5}, "unknown": {}}

    async def test_an_explanation_says_how_the_query_was_answered(self, shard):
        """It has what the filter matches of all live documents and how the vectors were searched; else there is none."""
        await shard.apply([put(seq, f"d{seq}", "apple", n=seq) for seq in range(1, 101)], 100)
        query = ShardQuery(5, unit(1), ["appl"], filter=parse_filter({"n": {"$lte": 20}}), explain=True)
        plan = (await shard.search(query)).plan
        assert plan["filter"]["matched"] == 20
        assert plan["filter"]["live"] == 100
        assert plan["filter"]["selectivity"] == pytest.approx(0.2)
        assert 0 <= plan["filter"]["estimated"] <= 100
        assert plan["vectors"]["vectors"] in ("exact", "hnsw", "ivf", "mixed")
        assert plan["lexical"]["found"] == 5
        assert (await shard.search(dense(1))).plan is None

    async def test_the_match_mode_of_words_is_obeyed(self, shard):
        """`all` wants every word, a phrase wants them in order, and a prefix stands for what begins with it."""
        texts = {"a": "green apple pie", "b": "apple of a green tree", "c": "green pear", "d": "pineapple"}
        await shard.apply([put(seq, id, text) for seq, (id, text) in enumerate(texts.items(), 1)], 4)
        terms = analyze("green apple")
        assert await found(shard, ShardQuery(9, terms=terms)) == ["a", "b", "c"]
        assert await found(shard, ShardQuery(9, terms=terms, match="all")) == ["a", "b"]
        assert await found(shard, ShardQuery(9, terms=terms, match="phrase")) == ["a"]
        assert await found(shard, ShardQuery(9, terms=["pine"], prefix=True)) == ["d"]

    @pytest.mark.parametrize(
        "words",
        [
            '"',
            '"unclosed',
            "*",
            "AND (",
            "title:",
            "words:apple",
            "~",
            "a~2",
            "[a TO b]",
            "\\",
            "-",
            "+apple^9",
            "/re/",
            "\u0000",
            "🙂",
        ],
    )
    async def test_query_syntax_has_no_meaning(self, shard, words):
        """Whatever characters a query has, it is words to look for and never a failure."""
        await shard.apply([put(1, "a", "apple"), put(2, "b", "pear")], 2)
        assert await found(shard, ShardQuery(5, terms=[words])) == []
        assert await found(shard, lexical(f"pear {words}")) in (["b"], ["a", "b"])

    async def test_words_of_any_script_are_found(self, shard):
        """Words with accents, and of other scripts, find their documents."""
        texts = {"a": "Überprüfung der Straße", "b": "поиск документов", "c": "αναζήτηση"}
        await shard.apply([put(seq, id, text) for seq, (id, text) in enumerate(texts.items(), 1)], 3)
        for id, word in (("a", "überprüfung"), ("b", "ПОИСК"), ("c", "αναζήτηση")):
            assert await found(shard, lexical(word)) == [id]

    async def test_statistics_count_documents_and_terms(self, shard):
        """They are of all documents, whichever word is asked for; an unknown word occurs in none."""
        assert (await shard.statistics(["appl"])).documents == 0
        await shard.apply([put(1, "a", "apple apple"), put(2, "b", "apple pear"), put(3, "c", "")], 3)
        statistics = await shard.statistics(analyze("apple pear kiwi apple"))
        assert statistics.documents == 3
        assert dict(statistics.doc_freq) == {"appl": 2, "pear": 1, "kiwi": 0}

    async def test_repeated_words_count_more(self, shard):
        """A word that the query has twice weighs twice."""
        await shard.apply([put(1, "a", "apple"), put(2, "b", "pear")], 2)
        scores = [
            {candidate.id: candidate.bm25 for candidate in (await shard.search(lexical(words))).candidates}
            for words in ("apple pear", "apple apple pear")
        ]
        assert scores[1]["a"] == pytest.approx(2 * scores[0]["a"], rel=1e-5)
        assert scores[1]["b"] == pytest.approx(scores[0]["b"], rel=1e-5)

    async def test_with_statistics_two_shards_score_as_one(self, make_shard):
        """A document has the same BM25 score beside few others and beside many, given the statistics of all."""
        shards = [await make_shard(), await make_shard()]
        await shards[0].apply([put(1, "a", "apple kiwi"), put(2, "b", "apple fig")], 2)
        await shards[1].apply(
            [put(seq, f"d{seq}", "apple kiwi" if seq == 3 else "pear fig") for seq in range(3, 30)], 30
        )
        terms = analyze("apple kiwi")
        parts = [await shard.statistics(terms) for shard in shards]
        query = ShardQuery(1, terms=terms, statistics=parts[0] + parts[1])
        best = [(await shard.search(query)).candidates[0] for shard in shards]
        assert [candidate.id for candidate in best] == ["a", "d3"]
        assert best[0].bm25 == pytest.approx(best[1].bm25, rel=1e-4)

    async def test_an_answer_says_where_the_time_went(self, shard):
        """The stages that ran are timed, in milliseconds."""
        await shard.apply([put(1, "a", "apple")], 1)
        answer = await shard.search(
            ShardQuery(5, vector=unit(1), terms=["appl"], filter=parse_filter({"x": {"$ne": 1}}))
        )
        assert {"filter", "dense", "lexical"} <= set(answer.timings_ms)
        assert all(0 <= taken < 60_000 for taken in answer.timings_ms.values())

    async def test_an_apply_is_seen_whole_or_not_at_all(self, shard):
        """A search during an apply that moves all documents from one state to the next sees a single state."""
        count, generations = 20, 12
        condition = parse_filter({"generation": {"$gte": 0}})
        query = ShardQuery(2 * count, vector=unit(1), terms=["appl"], filter=condition)

        async def write():
            for generation in range(generations):
                first = generation * count + 1
                await shard.apply(
                    [
                        put(
                            first + n, f"d{n}", f"apple {generation}", vector=unit(1, generation), generation=generation
                        )
                        for n in range(count)
                    ],
                    first + count - 1,
                )

        async def read():
            answers = []
            while not writing.done():
                answers.append(await shard.search(query))
            return answers

        writing = asyncio.create_task(write())
        answers = [answer for reader in await asyncio.gather(read(), read(), read()) for answer in reader]
        await writing
        for answer in answers:
            generation = answer.applied_seq // count - 1
            assert len(answer.candidates) == (count if answer.applied_seq else 0)
            assert all(candidate.bm25 is not None for candidate in answer.candidates)
            expected = float(unit(1, max(generation, 0)) @ unit(1))
            assert all(candidate.dense == pytest.approx(expected, abs=1e-6) for candidate in answer.candidates)
        assert len({answer.applied_seq for answer in answers}) > 1

    async def test_searches_and_writes_run_side_by_side(self, shard):
        """Mixed writes, searches, fetches and statistics for a while neither fail nor return what is not there."""
        numbers = np.random.default_rng(0)
        stop = asyncio.get_running_loop().time() + 0.5
        seq = 0

        async def write():
            nonlocal seq
            while asyncio.get_running_loop().time() < stop:
                operations = []
                for number in numbers.integers(0, 200, size=16):
                    seq += 1
                    document = put(
                        seq, f"d{number}", f"apple {number}", vector=unit(*numbers.random(DIM)), n=int(number)
                    )
                    operations.append(gone(seq, f"d{number}") if number % 5 == seq % 5 else document)
                await shard.apply(operations, seq)

        async def read():
            while asyncio.get_running_loop().time() < stop:
                query = ShardQuery(
                    30, unit(1), ["appl"], await shard.statistics(["appl"]), parse_filter({"n": {"$lt": 100}})
                )
                answer = await shard.search(query)
                documents = await shard.fetch([candidate.id for candidate in answer.candidates], vectors=True)
                for candidate in answer.candidates:
                    document = documents.get(candidate.id)
                    if document is not None and document.seq <= answer.applied_seq:
                        assert document.metadata["n"] < 100
                        assert candidate.dense == pytest.approx(float(document.vector @ unit(1)), abs=1e-6)

        await asyncio.gather(write(), read(), read(), read())
        answer = await shard.search(dense(1, limit=500))
        assert len(answer.candidates) == shard.documents
        assert answer.applied_seq == seq

    async def test_closing_waits_for_what_is_under_way(self, shard):
        """Searches that had begun are answered; afterwards the shard says it is closed; closing again does nothing."""
        await shard.apply([put(seq, f"d{seq}", "apple") for seq in range(1, 200)], 199)
        searches = [asyncio.create_task(shard.search(lexical("apple"))) for _ in range(20)]
        await asyncio.sleep(0)
        await shard.aclose()
        assert all(len(answer.candidates) == 10 for answer in await asyncio.gather(*searches))
        await shard.aclose()
        for call in (shard.search(dense(1)), shard.apply([], 200), shard.fetch(["a"]), shard.statistics([])):
            with pytest.raises(NotReady):
                await call
