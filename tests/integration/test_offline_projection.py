"""`tercet fit-pca`: the projection keeps what it says it keeps, and the served vectors go through it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.common.encoders import EncoderOptions, Projection, fingerprint_of, open_encoder
from services.embedding.offline.console import OfflineError
from services.embedding.offline.fitting import choose_documents, held_out_rows, read_judged
from services.embedding.offline.projection import apply, fit, ndcg, recall, unit
from services.embedding.offline.texts import Document, read_documents
from tests.tiny_models import write_bert

WORDS = ["rain", "river", "stone", "cloud", "wheat", "bread", "music", "train", "paper", "glass", "light", "winter"]


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(WORDS, 8)) + f" {number}" for number in range(count)]


def vectors(count: int, dim: int, spread: float = 0.6) -> np.ndarray:
    rng = np.random.default_rng(5)
    return unit((rng.standard_normal((count, dim)) * spread ** np.arange(dim) + 0.2).astype(np.float32))


def fit_pca(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tercet.cli", "fit-pca", "--precision", "fp32", *map(str, arguments)]
    environ = {"PATH": "", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights."""
    return write_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def test_components_are_orthonormal_and_best() -> None:
    """No mean is subtracted; components are of unit length; more of them keep more, as much as NumPy's SVD says."""
    data = vectors(300, 24)
    projection, share = fit(data, 6)
    assert not projection.mean.any()
    assert np.allclose(projection.components @ projection.components.T, np.eye(6), atol=1e-5)
    squares = np.linalg.svd(data.astype(np.float64), compute_uv=False) ** 2
    assert share == pytest.approx(squares[:6].sum() / squares.sum(), abs=1e-6)
    assert fit(data, 12)[1] > share


def test_fitting_is_deterministic() -> None:
    """The order of the vectors does not turn a component round."""
    data = vectors(300, 24)
    forward, _ = fit(data, 6)
    backward, _ = fit(data[::-1], 6)
    assert np.allclose(forward.components, backward.components, atol=1e-4)
    assert fit(data, 6)[0].name == forward.name


def test_recall_is_one_where_nothing_is_lost() -> None:
    """Vectors that lie in a subspace keep all their neighbours in it, and lose some below."""
    flat = unit(vectors(200, 8, spread=0.9) @ np.linalg.qr(np.random.default_rng(1).standard_normal((24, 8)))[0].T)
    rows = held_out_rows(len(flat))
    assert len(rows) == 20
    whole, _ = fit(flat, 8)
    assert recall(flat, apply(whole, flat), rows) == pytest.approx(1.0, abs=0.02)
    part, _ = fit(flat, 2)
    assert recall(flat, apply(part, flat), rows) < 0.9


def test_texts_that_span_too_little_are_refused() -> None:
    """Directions that are mere rounding are no dimensions."""
    flat = unit(np.tile(vectors(4, 24), (50, 1)))
    with pytest.raises(OfflineError, match="differ in 4 dimensions"):
        fit(flat, 8)


def test_ndcg_is_that_of_the_exact_order() -> None:
    """A relevant document at rank 1 is worth 1, at rank 2 one over log2 of 3."""
    documents = unit(np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32))
    query = np.array([1, 0], dtype=np.float32)
    assert ndcg(documents, ["a", "b", "c"], {"q": query}, {"q": {"a": 1}}) == pytest.approx(1)
    assert ndcg(documents, ["a", "b", "c"], {"q": query}, {"q": {"b": 1}}) == pytest.approx(1 / np.log2(3))


def test_sample_keeps_judged_documents(tmp_path: Path) -> None:
    """A text counts once, the draw is the same each time, and documents with a grade are always there."""
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "rain"}\n{"_id": "q2", "text": "nobody judged"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t7\t1\n")
    judged = read_judged(tmp_path / "queries.jsonl", tmp_path / "qrels.tsv")
    assert judged.queries == {"q1": "rain"}
    documents = [Document(str(number), f"text {number % 50}") for number in range(100)]
    assert len(choose_documents(documents, sample=0, judged=None)) == 50
    chosen = choose_documents(documents, sample=10, judged=judged)
    assert "7" in {document.id for document in chosen}
    assert len(chosen) in (10, 11)
    assert chosen == choose_documents(documents, sample=10, judged=judged)


def test_titles_go_before_texts(tmp_path: Path) -> None:
    """As search embeds them: on a line of their own, unless the text begins with the title."""
    file = tmp_path / "corpus.jsonl"
    entries = [{"_id": "a", "title": "Rain", "text": "It falls."}, {"text": "Rain falls.", "title": "Rain"}]
    file.write_text("\n".join(map(json.dumps, entries)))
    assert read_documents(file) == [Document("a", "Rain\nIt falls."), Document("2", "Rain falls.")]
    file.write_text('{"text": 5}')
    with pytest.raises(OfflineError, match="line 1: 'text' must be a string"):
        read_documents(file)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_projection_is_fitted_and_served(tiny: Path, tmp_path: Path) -> None:
    """The file that the command writes makes vectors of that size, under a fingerprint that names it."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "projection.npz"
    corpus.write_text("".join(json.dumps({"_id": str(n), "text": text}) + "\n" for n, text in enumerate(texts(150))))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": texts(150)[4]}))
    (tmp_path / "qrels.tsv").write_text("q\t4\t1\n")
    asked = ("--queries", tmp_path / "queries.jsonl", "--qrels", tmp_path / "qrels.tsv")
    arguments = ("--model", tiny, "--texts", corpus, "--dimensions", 8, "--out", out, *asked)
    done = fit_pca(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    for said in ("variance kept", "recall@10", "nDCG@10", "150: 135 to fit on, 15 held out", "projection="):
        assert said in done.stdout
    options = EncoderOptions(device="cpu", precision="fp32", runtime="torch", cache_dir=tmp_path, projection=out)
    encoder = open_encoder(str(tiny), options)
    assert encoder.pooled(encoder.tokenize(["rain"])).shape == (1, 8)
    name = Projection.load(out).name
    assert name in done.stdout
    assert f"+{name}" in fingerprint_of(encoder, str(tiny))
    again = fit_pca(tmp_path, *arguments)
    assert again.returncode == 1
    assert "--force" in again.stderr


@pytest.mark.timeout(300)
def test_what_cannot_be_fitted_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """Fewer texts than dimensions, more dimensions than the model has, a file that is not there."""
    lines, out = tmp_path / "lines.txt", tmp_path / "projection.npz"
    lines.write_text("\n".join(texts(40)))
    for arguments, message in (
        (("--texts", lines, "--dimensions", 36), "more than 36 different texts"),
        (("--texts", lines, "--dimensions", 32), "has 32 dimensions"),
        (("--texts", tmp_path / "nothing.txt", "--dimensions", 4), "nothing.txt cannot be read: No such file"),
    ):
        done = fit_pca(tmp_path, "--model", tiny, "--out", out, *arguments)
        assert done.returncode == 1, done.stdout
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not out.exists()
