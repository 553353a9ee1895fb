"""Reading BEIR's layout, and measures that were worked out by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest

from tercet.evaluation import DatasetError, load_beir, load_judged, measure

CORPUS = [
    {"_id": "d1", "title": "Apples", "text": "are red"},
    {"_id": "d2", "text": "pears\u2028are green"},
    {"_id": "d3", "title": "", "text": "plums are blue"},
    {"_id": "blank", "title": "", "text": " "},
]
QUERIES = [
    {"_id": "q1", "text": "red"},
    {"_id": "unjudged", "text": "yellow"},
    {"_id": "q2", "text": "blue"},
]
QRELS = "q1\td1\t2\nq1\td2\t1\nq2\td3\t1\nnowhere\td1\t1\n"


def write(path: Path, text: str, *, compress: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make(folder: Path, *, compress: bool = False, qrels: str = "qrels.tsv", header: bool = True) -> Path:
    for name, entries in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write(folder / f"{name}.jsonl", lines, compress=compress)
    write(folder / qrels, ("query-id\tcorpus-id\tscore\n" if header else "") + QRELS, compress=compress)
    return folder


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
@pytest.mark.parametrize("header", [False, True])
def test_every_form_of_the_layout_reads_the_same(tmp_path: Path, compress: bool, qrels: str, header: bool) -> None:
    """Plain or .gz, either place of the judgements, with or without a header line; content decides the digest."""
    beir = load_beir(make(tmp_path / "one", compress=compress, qrels=qrels, header=header))
    assert beir.queries == {"q1": "red", "q2": "blue"}
    assert beir.qrels == {"q1": {"d1": 2, "d2": 1}, "q2": {"d3": 1}}
    assert [document["id"] for document in beir.documents()] == ["d1", "d2", "d3"]
    assert [document.get("title") for document in beir.documents()] == ["Apples", None, None]
    assert beir.summary == load_beir(make(tmp_path / "two")).summary
    assert beir.summary.documents == 3
    assert list(beir.first(1).qrels) == ["q1"]


def test_trec_judgements_and_another_file(tmp_path: Path) -> None:
    """The four-column form is read too, from wherever it is."""
    other = tmp_path / "other.txt"
    other.write_text("q2 0 d1 1\n")
    assert load_beir(make(tmp_path / "one"), qrels=other).qrels == {"q2": {"d1": 1}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels.tsv", "q1\td1\t1\nq1\td1\tgood\n", r"qrels.tsv, line 2: not query"),
        ("qrels.tsv", "other\td1\t1\n", "none of the queries"),
        ("queries.jsonl", '{"_id": "q1"}\n', r"queries.jsonl, line 1: 'text' must be"),
        ("queries.jsonl", "[1]\n", r"line 1: not a JSON object"),
        ("queries.jsonl", "{\n", r"line 1: not valid JSON"),
        ("queries.jsonl", '{"text": "no id"}\n', "'_id' must be a string"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    """The message leads to the place to mend."""
    folder = make(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_beir(folder)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """A folder that is not there and a file that is not there are told apart; .gz that is none is said."""
    with pytest.raises(DatasetError, match="no such folder"):
        load_beir(tmp_path / "nope")
    with pytest.raises(DatasetError, match=r"no qrels.tsv or qrels/test.tsv"):
        load_beir(tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        load_beir(make(tmp_path / "one"), qrels=tmp_path / "nope.tsv")
    folder = make(tmp_path / "two")
    (folder / "queries.jsonl").rename(folder / "queries.jsonl.gz")
    with pytest.raises(DatasetError, match=r"queries.jsonl.gz"):
        load_beir(folder)


def test_measures_are_those_worked_out_by_hand() -> None:
    """Graded gains over log2 of the rank, the first right rank's reciprocal, and the share found."""
    qrels = {"q1": {"d1": 2, "d2": 1}, "q2": {"d3": 1}}
    found = measure(qrels, {"q1": ["d9", "d2", "d1"], "q2": ["d3"]})
    dcg = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert found["nDCG@10"] == pytest.approx((dcg / ideal + 1) / 2)
    assert found["RR@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["R@100"] == pytest.approx(1.0)


def test_a_query_without_answers_counts_as_zero() -> None:
    """Leaving hard queries out must not raise the mean, and an order of many ids is kept as it was."""
    qrels = {"q1": {"d1": 1}, "q2": {"d3": 1}}
    assert measure(qrels, {"q1": ["d1"], "q2": []}) == pytest.approx({"nDCG@10": 0.5, "R@100": 0.5, "RR@10": 0.5})
    late = [f"x{number}" for number in range(10)] + ["d1"]
    assert measure({"q1": {"d1": 1}}, {"q1": late}) == pytest.approx({"nDCG@10": 0, "R@100": 1, "RR@10": 0})


def test_judgements_without_documents(tmp_path: Path) -> None:
    """A folder, its qrels alone, qrels with queries from elsewhere, and lines with answers are the same judgements."""
    folder = make(tmp_path / "one")
    (folder / "corpus.jsonl").unlink()
    expected = ({"q1": "red", "q2": "blue"}, {"q1": {"d1": 2, "d2": 1}, "q2": {"d3": 1}})
    assert load_judged(folder) == load_judged(folder / "qrels.tsv") == expected
    elsewhere = (folder / "queries.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert load_judged(folder / "qrels.tsv", queries=elsewhere) == expected
    lines = [{"query": "red", "answers": ["d1", "d2"]}, {"query": "none", "answers": []}]
    write(tmp_path / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines), compress=True)
    assert load_judged(tmp_path / "answers.jsonl.gz") == ({"0": "red"}, {"0": {"d1": 1, "d2": 1}})


@pytest.mark.parametrize("line", ['{"query": 1, "answers": ["a"]}', '{"query": "q", "answers": "a"}', '{"query": "q"}'])
def test_lines_that_are_no_judgements(tmp_path: Path, line: str) -> None:
    """The file and the line are named; a file in which nothing is answered is an error too."""
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 1"):
        load_judged(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"query": "q", "answers": []}')
    with pytest.raises(DatasetError, match="no query has an answer"):
        load_judged(tmp_path / "empty.jsonl")
