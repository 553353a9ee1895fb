"""The evaluation of ranking quality: sets, orders from stage scores, the paired test, and the report."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import rerank_quality
from benchmarks.rerank_paired import compare
from benchmarks.rerank_runs import per_query, reblended
from benchmarks.rerank_servers import MAX_SIM
from benchmarks.rerank_sets import MOST_HELD_BACK, JudgedSet, judged_sets
from benchmarks.rerank_tables import DEFAULT, HYBRID, RRF, WITHOUT_BLEND, WITHOUT_FIRST, WITHOUT_LAST, Quality, report
from services.common.wire.search import Hit, StageScores
from tercet.evaluation import measure
from tercet.ingest import DocumentDict
from training.data import is_held_back


def _hit(id_: str, fused: float, rerank: float | None) -> Hit:
    return Hit(id=id_, score=0.0, score_kind="blended", stages=StageScores(fused=fused, rerank=rerank))


def test_blends_reorder_what_was_reranked():
    """Weight 0 is retrieval's order, 1 the reranker's; what was not reranked follows, in retrieval order."""
    hits = [_hit("c", 0.1, 0.9), _hit("a", 0.9, 0.1), _hit("b", 0.5, 0.5), _hit("y", 0.01, None), _hit("x", 0.05, None)]
    assert reblended(hits, 0.0) == ["a", "b", "c", "x", "y"]
    assert reblended(hits, 1.0) == ["c", "b", "a", "x", "y"]


def test_blends_keep_apart_what_only_the_first_model_scored():
    """An answer's first ones are those that a cascade's last model scored: the others stay behind them."""
    hits = [_hit("c", 0.1, 0.2), _hit("a", 0.9, 0.1), _hit("b", 0.5, 0.9)]
    assert reblended(hits, 1.0, 2) == ["c", "a", "b"]
    assert reblended(hits, 0.0, 2) == ["a", "c", "b"]


def test_the_measure_of_each_query_has_the_known_mean():
    """The values by query, with zero for one that found nothing, have the mean that `tercet eval` prints."""
    qrels = {"q1": {"a": 2, "b": 1}, "q2": {"c": 1}, "q3": {"d": 1}}
    run = {"q1": ["b", "x", "a"], "q2": ["c"], "q3": []}
    values = per_query(qrels, run)
    assert list(values) == ["q1", "q2", "q3"]
    assert values["q2"] == 1.0
    assert values["q3"] == 0.0
    assert sum(values.values()) / 3 == pytest.approx(measure(qrels, run)["nDCG@10"])


def test_equal_systems_differ_by_chance_alone():
    """Without a difference every choice of signs gives as much: p is 1."""
    found = compare([([0.5, 0.7], [0.5, 0.7])])
    assert (found.difference, found.better, found.equal, found.worse, found.p) == (0.0, 0, 2, 0, 1.0)


def test_p_is_the_share_of_signs_that_give_as_much():
    """Three queries better by one: of the eight choices of signs two give a mean as large, all plus and all minus."""
    assert compare([([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])]).p == pytest.approx(0.25, abs=0.02)
    assert compare([([1.0] * 30, [0.0] * 30)]).p < 0.001


def test_sets_count_the_same_whatever_their_size():
    """The difference over two sets is the mean of their means, and the test is the same each time."""
    groups = [([1.0] * 2, [0.0] * 2), ([0.0] * 8, [0.5] * 8)]
    found = compare(groups)
    assert found.difference == pytest.approx(0.25)
    assert (found.better, found.worse) == (2, 8)
    assert compare(groups) == found


def test_a_model_to_try_stands_behind_the_usual_first_stage():
    """The rows without a stage have the other one alone."""
    made = rerank_quality.variants("./model")
    assert made[DEFAULT]["RERANK_MODEL"] == "./model"
    assert made[DEFAULT]["RERANK_FIRST_STAGE"] == MAX_SIM
    assert made[WITHOUT_FIRST] == {"RERANK_MODEL": "./model", "RERANK_FIRST_STAGE": "none"}
    assert made[WITHOUT_LAST] == {"RERANK_MODEL": MAX_SIM, "RERANK_FIRST_STAGE": "none"}


def test_the_default_is_not_set_up():
    """What is evaluated as the default is what the services do when they are told nothing."""
    assert rerank_quality.variants()[DEFAULT] == {}


def _write(file: Path, entries: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode()))


def test_questions_that_training_keeps_back_are_asked(tmp_path: Path):
    """Of a training set there are the questions about articles that training does not see, over all its passages."""
    articles = [f"article {number}" for number in range(60)]
    _write(
        tmp_path / "squad_dev/passages.jsonl.gz",
        [{"_id": f"p{number}", "title": title, "text": f"About {title}."} for number, title in enumerate(articles)],
    )
    pairs = [{"query": f"What is {title}?", "passage_id": f"p{number}"} for number, title in enumerate(articles)]
    _write(tmp_path / "squad_dev/pairs.jsonl.gz", pairs)
    (found,) = judged_sets(tmp_path, ["squad_dev", "medquad"])
    kept = [number for number, title in enumerate(articles) if is_held_back("squad_dev", title)]
    assert 0 < len(kept) < MOST_HELD_BACK
    assert list(found.qrels.values()) == [{f"p{number}": 1} for number in kept]
    assert list(found.queries.values()) == [f"What is {articles[number]}?" for number in kept]
    assert len(found.documents) == 60


def _quality(default: float) -> Quality:
    quality = Quality({"wikiqa": "wikiqa (2)", "squad_dev": "squad_dev (1)"}, blend=0.5)
    for row, value in ((RRF, 0.5), (HYBRID, 0.52), (DEFAULT, default), (WITHOUT_BLEND, 0.4)):
        quality.values[row] = {"wikiqa": {"q1": value, "q2": value}, "squad_dev": {"q3": value}}
        quality.ms[row] = {"wikiqa": 10.0, "squad_dev": 20.0}
    quality.values[WITHOUT_FIRST] = {"wikiqa": {"q1": 0.5, "q2": 0.5}}
    quality.blends[DEFAULT] = {0.0: {"wikiqa": 0.5, "squad_dev": 0.6}, 0.5: {"wikiqa": 0.7, "squad_dev": 0.7}}
    return quality


def test_the_report_says_what_was_reached():
    """The tables have every row that was measured on all sets, and each aim its figure."""
    text = report(_quality(0.6), commit="abc", machine=["processor: P"], command="python -m x", note="first")
    assert "| hybrid + rerank (default) | 0.600 | 0.600 | 0.600 | 0.600 | 15 |" in text
    assert "mean over equal RRF: +0.1000 (to reach: ≥ +0.035): reached" in text
    assert "mean over hybrid without rerank: +0.0800 (to reach: ≥ +0.015): reached" in text
    assert "| 0.5 | 0.700 | 0.700 | 0.700 |" in text
    assert WITHOUT_FIRST not in text
    assert "| 3 / 0 / 0 |" in text


def test_the_report_says_what_was_missed():
    """A set on which rerank does harm is named."""
    quality = _quality(0.53)
    quality.values[DEFAULT]["squad_dev"] = {"q3": 0.5}
    text = report(quality, commit="abc", machine=[], command="python -m x", note="")
    assert "mean over equal RRF: +0.0150 (to reach: ≥ +0.035): missed" in text
    assert "the set that gains least, squad_dev: -0.0200 (to reach: ≥ −0.005): missed" in text


@pytest.mark.slow
async def test_searches_are_evaluated_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Real services are asked over HTTP, and the default blend computed from the stages' scores is the order found."""
    fakes = {"RERANK_MODEL": "fake", "EMBEDDING_MODEL": "fake"}
    monkeypatch.setattr(rerank_quality, "variants", lambda model=None: {DEFAULT: fakes})
    monkeypatch.setattr(rerank_quality, "DATA_DIR", tmp_path)
    words = ["river stone", "garden window", "letter market", "summer winter"]
    documents = [DocumentDict(id=f"d{n}", text=text, metadata={}) for n, text in enumerate(words)]
    queries = {f"q{n}": text for n, text in enumerate(words)}
    judged = JudgedSet("toy", documents, queries, {f"q{n}": {f"d{n}": 1} for n in range(len(words))})
    quality = await rerank_quality.evaluate([judged], {}, None)
    assert quality.rows() == [RRF, HYBRID, DEFAULT, WITHOUT_BLEND]
    assert quality.mean(DEFAULT) == 1.0
    assert len(quality.facts) == 1
