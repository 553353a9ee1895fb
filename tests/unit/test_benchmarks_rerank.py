"""The rerank benchmark's requests, arithmetic and clients; and short runs against the fake scorer."""

import json
from pathlib import Path

import pytest

from benchmarks import rerank_crowd, rerank_model
from benchmarks.effort import Effort
from benchmarks.gemm import Limit, flop_per_text
from benchmarks.load import LoadFailed
from benchmarks.rerank_client import Outcome
from benchmarks.rerank_crowd import DEADLINE_MS, DOCUMENTS, crowd, lateness, shares
from benchmarks.rerank_inprocess import WARM_UPS, Timed, backend, timed
from benchmarks.rerank_rows import PAIRS, limit_ms, max_sim
from benchmarks.rerank_servers import PAIR_TOKENS, requests, rerank
from benchmarks.servers import OURS, ServerFailed, model_directory, running

BRIEF = Effort(rounds=1, scale=0.01, mixed_s=0)


def test_pairs_are_distinct_and_as_long_as_said():
    """The packaged model's tokenizer finds 128 tokens in every pair, and no text comes twice."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    made = requests(20, 5, seed=3)
    assert {len(tokenizer.encode(query, text).ids) for query, *texts in made for text in texts} == {PAIR_TOKENS}
    assert len({text for request in made for text in request}) == 20 * 6


def test_fewer_requests_are_a_prefix_of_more():
    """Every server is asked the same in the same order, however many requests were made for it."""
    assert requests(10, 4, seed=3)[:4] == requests(4, 4, seed=3)
    assert requests(4, 4, seed=3) != requests(4, 4, seed=4)


def test_our_body_is_a_query_with_its_documents():
    """The first text is the query."""
    assert json.loads(rerank().body(["q", "a", "b"], {})) == {"query": "q", "documents": ["a", "b"]}


def test_the_limit_is_that_of_all_tokens():
    """A machine that multiplies 100 texts of 130 tokens a second needs 492 ms for 50 pairs of 128."""
    limit = Limit(100.0, 100.0, 100 * flop_per_text() / 1e9, 10)
    assert limit_ms(limit) == pytest.approx(PAIRS * 128 / 130 / 100 * 1000)


def _outcomes(*scored: int, status: int = 200) -> list[Outcome]:
    return [Outcome(1.0 + number, 500.0, status, count) for number, count in enumerate(scored)]


def test_a_fair_share_is_the_mean():
    """Of requests with 8, 8, 8, 4 and 2 scored the mean is 6, and the last has a third of it: less than half."""
    found = shares(_outcomes(8, 8, 8, 4, 2), start_s=0.0, end_s=10.0, documents=20)
    assert (found.fair, found.pairs_per_s, found.requests, found.under_half) == (6.0, 3.0, 5, 1)
    assert found.least == pytest.approx(1 / 3)


def test_a_request_that_was_turned_away_has_no_share():
    """A 429 counts as nothing scored."""
    refused = [Outcome(2.0, 1.0, 429, 0)]
    assert shares([*_outcomes(8, 8), *refused], start_s=0.0, end_s=10.0, documents=20).least == 0.0


def test_what_ended_outside_the_stretch_is_not_counted():
    """The ramp at the start and what was under way at the end belong to no figure."""
    found = shares(_outcomes(20, 5, 5, 20), start_s=1.5, end_s=3.5, documents=20)
    assert (found.requests, found.pairs_per_s) == (2, 5.0)


def test_a_whole_answer_is_a_whole_share():
    """Who asked for little and got it all was not held short, whatever others scored."""
    assert shares(_outcomes(5, 50, 50), start_s=0.0, end_s=10.0, documents=5).least == 1.0


def test_nothing_scored_is_no_figure():
    """A service that answers but scores nothing fails the row."""
    with pytest.raises(LoadFailed, match="none had a document scored"):
        shares(_outcomes(0, 0), start_s=0.0, end_s=10.0, documents=20)


def test_lateness_counts_from_the_deadline():
    """An answer before its deadline is not late; one 70 ms after it is the worst."""
    outcomes = [Outcome(1.0, DEADLINE_MS - 5, 200, DOCUMENTS), Outcome(1.0, DEADLINE_MS + 70, 200, 3)]
    late, answers = lateness([*outcomes, Outcome(1.0, 1.0, 429, 0)])
    assert "worst 70.0 ms" in late
    assert answers == "answers: whole 1, partial 1, 429 1"


def test_warm_ups_are_not_timed():
    """Each request is scored once, and those after the first few are timed until the time is up."""
    scored: list[str] = []
    made = [[f"query {number}", "document"] for number in range(WARM_UPS + 2)]
    seconds = timed(lambda request: scored.append(request[0]), made, duration_s=60.0)
    assert len(seconds) == 2
    assert scored == [query for query, _ in made]
    assert Timed(50, [0.5, 0.5, 1.0]).pairs_per_s == 75.0


def test_our_backend_is_called_directly():
    """A request is tokenised and scored without a service, each document in its place."""
    assert backend("fake")(["red green", "red", "red green", "blue"]) == [0.5, 1.0, 0.0]


@pytest.mark.slow
def test_the_crowd_and_the_cached_documents_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real service is asked by the crowd's client, and one request at a time; both end in a line of the table."""
    monkeypatch.setattr(rerank_crowd, "MOST_PER_CLIENT_PER_S", 100)  # The fake scorer is faster than any model.
    with running([rerank(model="fake")], tmp_path) as servers:
        together = crowd(BRIEF, servers[OURS], Path("fake"))
        one_by_one = max_sim(BRIEF, servers[OURS])
    for row in (together, one_by_one):
        assert [line[0] for line in row.lines] == [OURS]
        assert len(row.lines[0]) == len(row.header)
    assert together.findings[1].startswith("answers: whole")


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path):
    """The message holds what the process wrote before it ended."""
    from benchmarks.rerank_inprocess import measure_apart

    with pytest.raises(ServerFailed, match="no-such-model"):
        measure_apart("backend", tmp_path / "no-such-model", documents=1, duration_s=0.1, seed=0)


@pytest.mark.slow
def test_the_benchmarks_model_is_a_cross_encoder(tmp_path: Path):
    """sentence-transformers loads it with one label, and real pairs get scores that differ."""
    from sentence_transformers import CrossEncoder

    directory = rerank_model.make(tmp_path / "model")
    loaded = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    scores = loaded.predict([("What is a list?", text) for text in ("A list is mutable.", "Sockets close.", "")])
    assert loaded.num_labels == 1
    assert len(set(scores.tolist())) == 3
