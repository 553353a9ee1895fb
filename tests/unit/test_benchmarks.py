"""The benchmarks' own arithmetic, texts and report; and one short run of the first row against the fake model."""

import json
import random
import signal
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.client import Plan, requests_of
from benchmarks.corpus import TOKENS, Questions
from benchmarks.corpus import texts as documents
from benchmarks.effort import Effort
from benchmarks.figures import number, percentile, ratio, slope_per_minute, spread
from benchmarks.gemm import flop_per_text
from benchmarks.load import LoadFailed, Stretch, hammer, steady_rate
from benchmarks.report import Row
from benchmarks.servers import OURS, ServerFailed, model_directory, running, tercet
from benchmarks.texts import (
    LONG_TOKENS,
    SHORT_TOKENS,
    WORDS,
    check_lengths,
    mixed_texts,
    model_token_counter,
    texts,
)
from benchmarks.throughput import short_texts


@pytest.mark.parametrize("tokens", [SHORT_TOKENS, LONG_TOKENS])
def test_texts_are_distinct_and_as_long_as_said(tokens: int):
    """The packaged model's tokenizer finds the stated number of tokens in each text, and no text comes twice."""
    made = texts(500, tokens, seed=1)
    count_tokens = model_token_counter(str(model_directory()))
    assert len(set(made)) == 500
    assert {count_tokens(text) for text in made} == {tokens}


def test_documents_are_distinct_and_of_about_their_length():
    """Documents have about a hundred tokens each on average, no two are alike, and fewer of them are a prefix of more."""
    made = documents(500)
    count_tokens = model_token_counter(str(model_directory()))
    assert len(set(made)) == 500
    assert sum(map(count_tokens, made)) / 500 == pytest.approx(TOKENS, rel=0.05)
    assert documents(50) == made[:50]


def test_no_question_is_asked_twice():
    """Questions that were taken do not come again, have 5 to 8 words, and are the same ones in the next run."""
    questions = Questions()
    taken = [*questions.take(2000), *questions.take(1000)]
    assert len(set(taken)) == 3000
    assert {len(question.split()) for question in taken} == {5, 6, 7, 8}
    assert Questions().take(3000) == taken


def test_questions_that_are_used_up_are_an_error():
    """A sentence of eight words has ten runs of five to eight: an eleventh question is not waited for."""
    questions = Questions(["one two three four five six seven eight"])
    assert len(set(questions.take(10))) == 10
    with pytest.raises(LoadFailed, match="10 questions"):
        questions.take(1)


def test_every_word_is_one_token():
    """A text's length in tokens is its words and two markers, whichever words were drawn."""
    count_tokens = model_token_counter(str(model_directory()))
    assert {word: count_tokens(word) for word in WORDS if count_tokens(word) != 3} == {}


def test_texts_depend_on_the_seed_alone():
    """Two servers, or two runs, are given the same texts; another round is given others."""
    assert texts(50, SHORT_TOKENS, seed=7) == texts(50, SHORT_TOKENS, seed=7)
    assert not set(texts(50, SHORT_TOKENS, seed=7)) & set(texts(50, SHORT_TOKENS, seed=8))


def test_too_many_distinct_texts_are_refused():
    """One word cannot make a thousand distinct texts, and drawing on would never end."""
    with pytest.raises(ValueError, match="not 1000 distinct texts"):
        texts(1000, 3, seed=0)


def test_mixed_texts_span_short_and_long():
    """Mixed texts have lengths from 6 to 250 tokens, short ones more often."""
    lengths = sorted(len(text.split()) + 2 for text in mixed_texts(2000, seed=0))
    assert 6 <= lengths[0] < 8
    assert 240 < lengths[-1] <= 250
    assert lengths[1000] < 60


def test_a_wrong_length_is_noticed():
    """A tokenizer that cuts the words differently makes the check fail, not the figures wrong."""
    with pytest.raises(ValueError, match="has 20 tokens, not 10"):
        check_lengths(["eight words"], SHORT_TOKENS, lambda text: 20)


def test_percentile_is_nearest_rank():
    """The p99 of 100 values is the 99th, of 10 the greatest; the order of the values does not matter."""
    values = [float(value) for value in range(1, 101)]
    random.Random(0).shuffle(values)
    assert percentile(values, 99) == 99
    assert percentile(values, 50) == 50
    assert percentile(values[:1], 50) == values[0]
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 99) == 10


def test_ratio_compares_rounds_with_themselves():
    """A machine that is half as fast in one round halves both servers: the ratio stays what it is."""
    assert ratio([300.0, 150.0, 330.0], [100.0, 50.0, 100.0]) == spread([3.0, 3.0, 3.3])
    assert ratio([300.0, 150.0, 330.0], [100.0, 50.0, 100.0]).median == pytest.approx(3.0)


def test_slope_is_per_minute():
    """A megabyte every two seconds is thirty a minute."""
    assert slope_per_minute([0.0, 2.0, 4.0], [100.0, 101.0, 102.0]) == pytest.approx(30.0)
    assert slope_per_minute([0.0, 1.0, 2.0], [7.0, 7.0, 7.0]) == 0


def test_numbers_keep_three_digits():
    """Figures are as precise as they can be meant."""
    shown = [number(value) for value in (12345.6, 286.4, 28.64, 2.864, 0.02864, 0.0)]
    assert shown == ["12,346", "286", "28.6", "2.86", "0.0286", "0"]
    assert str(spread([3.0, 1.0, 2.0])) == "2.00 (1.00–3.00)"


def test_steady_rate_leaves_out_the_ramp():
    """Two connections that need a second per request answer two a second, however long the first wave took."""
    assert steady_rate([3.0, 3.0, 4.0, 4.0, 5.0, 5.0], connections=2) == 2.0
    with pytest.raises(LoadFailed, match="measure longer"):
        steady_rate([3.0, 3.0], connections=2)


def test_a_stretch_is_long_enough_for_slow_requests():
    """Four waves fit into a stretch; one that is long enough stays as it is."""
    assert Stretch(4, 10.0).long_enough_for(0.1) == Stretch(4, 10.0)
    assert Stretch(4, 10.0).long_enough_for(2.0) == Stretch(4, 32.0)


def test_gemm_counts_the_models_products():
    """all-MiniLM-L6-v2 multiplies 10.6 million weights per token: 21.2 MFLOP, 2.76 GFLOP per text of 130 tokens."""
    assert flop_per_text() == 2 * 130 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)


def test_the_client_sends_bodies_in_order_and_again(tmp_path: Path):
    """Each line of the file is one request, with its length; after the last comes the first."""
    file = tmp_path / "bodies"
    file.write_bytes(b'{"inputs":"one"}\n{"inputs":"second"}')
    requests = requests_of(Plan("h", 1, "/embed", str(file), connections=1, duration_s=1))
    first, second, third = (next(requests) for _ in range(3))
    assert first == third
    assert first.startswith(b"POST /embed HTTP/1.1\r\nHost: h\r\n")
    assert second.endswith(b'Content-Length: 19\r\n\r\n{"inputs":"second"}')


def test_our_bodies_are_what_the_service_reads():
    """One text goes as a string, several as a list; fields such as the lane beside them."""
    body = tercet().body
    assert json.loads(body(["one"], {})) == {"inputs": "one"}
    assert json.loads(body(["one", "two"], {"lane": "bulk"})) == {"inputs": ["one", "two"], "lane": "bulk"}


def _row() -> Row:
    row = Row("short", "short texts", "2 rounds", ("server", "requests/s"))
    row.lines.append((OURS, str(spread([100.0, 110.0]))))
    row.findings.append("as it should be")
    return row


def test_report_is_a_markdown_section():
    """A section names commit, change, command and machine, and holds the table and the plot."""
    text = report.section(
        [_row()], commit="abc", note="faster", machine=["processor: P"], command="python -m x", plot="plots/p.png"
    )
    assert ", abc\n" in text.splitlines()[0] + "\n"
    assert "What changed: faster\n" in text
    assert "Command: `python -m x`\n" in text
    assert "* processor: P\n" in text
    assert "| server | requests/s |\n|---|---|\n| tercet | 105 (100–110) |\n\n* as it should be\n" in text
    assert "![figures by server](plots/p.png)" in text


def test_sections_are_added_at_the_end(tmp_path: Path):
    """What RESULTS.md holds stays; a missing file is begun."""
    file = tmp_path / "new" / "RESULTS.md"
    report.append(file, "## first\n")
    report.append(file, "## second\n")
    assert file.read_text() == "# Measurements\n\n## first\n\n## second\n"


def test_a_plot_is_drawn_or_its_absence_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With matplotlib the file is a PNG; without, nothing is written and a line says why."""
    row = _row()
    row.bars["requests/s"] = {OURS: spread([100.0, 110.0]), "infinity": spread([20.0])}
    row.curve = [(0.0, 100.0), (1.0, 101.0)]
    row.paths["latency"] = {f"{OURS} p50": [(10.0, 5.0), (20.0, 6.0)], f"{OURS} p99": [(10.0, 9.0), (20.0, 30.0)]}
    file = tmp_path / "plots" / "plot.png"
    if report.plot([row], file):
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in capsys.readouterr().out
        assert not file.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path):
    """The message holds what the server wrote before it ended."""
    with pytest.raises(ServerFailed, match="no-such-model"), running([tercet(model="./no-such-model")], tmp_path):
        pass


@pytest.mark.slow
def test_the_first_row_runs(tmp_path: Path):
    """A real service, the asyncio client and the row's arithmetic end in a table line; afterwards the service is gone."""
    with running([tercet(model="fake", EMBEDDING_CACHE_BYTES="0")], tmp_path) as servers:
        server = servers[OURS]
        row = short_texts(Effort(rounds=1, scale=0.1, mixed_s=0), servers, wrk=None)
        server.resume()
        with pytest.raises(LoadFailed, match="1 distinct requests were too few"):
            hammer(server, [["again"]], Stretch(1, 0.3), wrk=None)
        assert server.resident_mb() > 10
    assert [line[0] for line in row.lines] == [OURS]
    assert row.bars["requests/s"][OURS].median > 0
    assert server.process.returncode in (0, -signal.SIGTERM)
