"""Cross-encoders with random weights: their scores are sentence-transformers', by either runtime, whole or in windows."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from services.common.encoders import EncoderOptions
from services.common.encoders.pairs.golden import closeness
from services.common.model_errors import InvalidModel
from services.rerank.backends.cross_encoder import CrossEncoderBackend, open_cross_encoder
from services.rerank.ports import Backend, Window
from tests.tiny_models import POSITIONS
from tests.tiny_pair_models import edit_json, library_scores, write_classifier, write_modular, write_roberta

pytestmark = pytest.mark.usefixtures("one_torch_thread")

QUERY = "What does the quick fox do?"
DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog.",
    "one",
    "",
    "東京, Москва and 12,345.67 €",
    "A short question? Yes.\nAnd  an answer",
)
ODD_TEXTS = ("", " ", "\n", "!", "\u200b", "\U0010ffff", "a\u0000b", "[SEP] [CLS]", "e" * 3000)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by what is particular to them."""
    place = tmp_path_factory.mktemp("models")
    return {
        "classic": write_classifier(place / "classic"),
        "modular": write_modular(place / "modular"),
        "prompted": write_modular(place / "prompted", prompt="search: "),
        "no types": write_roberta(place / "roberta"),
        "identity": write_classifier(place / "identity", activation="torch.nn.modules.linear.Identity"),
        "tanh": write_classifier(place / "tanh", activation="torch.nn.modules.activation.Tanh"),
    }


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    """Where these tests' conversions and choices are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(models, cache_dir):
    """Return a function that opens a tiny model, each once."""
    kept: dict[str, Backend] = {}

    def of(name: str, *, max_tokens: int = 256, **options) -> Backend:
        asked = {"cache_dir": cache_dir, "threads": 1, "device": "cpu"} | options
        key = f"{name} {max_tokens} {asked}"
        if key not in kept:
            kept[key] = open_cross_encoder(str(models[name]), EncoderOptions(**asked), max_tokens=max_tokens)
        return kept[key]

    yield of
    for backend in kept.values():
        backend.close()


def whole(backend: Backend, query: str, texts) -> list[Window]:
    """Return each text as one window, cut to the room that there is."""
    tokens = backend.tokenize_query(query)
    room = backend.room(tokens)
    return [Window(tokens, document, 0, min(room, len(document.ids))) for document in backend.tokenize(texts)]


def raw_scores(backend: Backend, query: str, texts) -> list[float]:
    """Return the raw scores of *texts*, computed as one batch."""
    return [backend.relevance(output) for output in backend.score(whole(backend, query, texts))]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("kind", ["classic", "modular", "prompted", "no types"])
def test_every_kind_gives_what_sentence_transformers_gives(opened, models, kind: str, runtime: str) -> None:
    """Raw scores are its predictions without activation, probabilities its own predictions."""
    backend = opened(kind, runtime=runtime, precision="fp32")
    pairs = [(QUERY, text) for text in DOCUMENTS]
    ours = raw_scores(backend, QUERY, DOCUMENTS)
    assert ours == pytest.approx(library_scores(models[kind], pairs, activation_fn=torch.nn.Identity()), abs=1e-4)
    assert [backend.to_probability(raw) for raw in ours] == pytest.approx(library_scores(models[kind], pairs), abs=1e-4)
    assert np.ptp(ours) > 0.01
    assert backend.info.runtime == f"{runtime} (cpu)"
    assert (backend.info.kind, backend.info.labels, backend.info.ranks) == ("cross-encoder", (), True)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_score_does_not_depend_on_its_company(opened, runtime: str) -> None:
    """Nor on its place in the batch, nor on whose query stands beside it."""
    backend = opened("classic", runtime=runtime, precision="fp32")
    windows = [one for query in (QUERY, "one", "") for one in whole(backend, query, DOCUMENTS)]
    together = backend.score(windows)
    assert backend.score(windows[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    alone = np.concatenate([backend.score([window]) for window in windows])
    assert alone == pytest.approx(together, abs=1e-5)
    assert (together.shape, together.dtype) == ((15, 1), np.float32)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_any_text_has_a_score(opened, text: str) -> None:
    """As a document and as a query; a pair counts its special tokens."""
    backend = opened("classic", runtime="torch", precision="fp32")
    (window,) = whole(backend, text, [text])
    assert backend.tokens(window) == backend.cost_tokens(window) == 3 + len(window.query.ids) + window.end
    assert backend.tokens(window) <= backend.info.max_tokens
    assert np.isfinite(backend.score([window])).all()


def test_a_long_query_is_cut_to_half_and_says_so(opened) -> None:
    """Its beginning is read, and a document has the rest; a shorter query is whole."""
    backend = opened("classic", runtime="torch", precision="fp32")
    query = backend.tokenize_query("quick fox " * 300)
    assert query.cut
    assert len(query.ids) == POSITIONS // 2
    assert query.ids.tolist() == backend.tokenize(["quick fox " * 300])[0].ids[: POSITIONS // 2].tolist()
    assert backend.room(query) == POSITIONS - POSITIONS // 2 - 3 >= POSITIONS / 3
    short = backend.tokenize_query("quick fox")
    assert not short.cut
    assert backend.room(short) == POSITIONS - len(short.ids) - 3
    assert short.key == backend.tokenize(["quick fox"])[0].key != query.key


def test_a_window_is_read_as_its_part_of_the_text(opened, models) -> None:
    """Tokens from the middle of a document score as the characters that they cover."""
    backend = opened("classic", runtime="torch", precision="fp32")
    text = " ".join(f"The fox{number} jumps over dog{number * 7}." for number in range(60))
    (document,) = backend.tokenize([text])
    query = backend.tokenize_query(QUERY)
    assert len(document.ids) > 3 * backend.room(query)
    assert document.offsets is not None
    starts = [at for at, (start, _) in enumerate(document.offsets) if text[start:].startswith(" The fox")]
    windows = [Window(query, document, start, end) for start, end in zip(starts[:-2:9], starts[2::9], strict=False)]
    parts = [text[document.offsets[one.start][0] : document.offsets[one.end - 1][1]] for one in windows]
    assert parts[1].startswith(" The fox10 jumps")
    theirs = library_scores(models["classic"], [(QUERY, part) for part in parts], activation_fn=torch.nn.Identity())
    assert backend.score(windows)[:, 0].tolist() == pytest.approx(theirs, abs=1e-4)


def test_offsets_are_the_texts_characters(opened) -> None:
    """Also of text that takes several tokens a character; together they cover everything."""
    backend = opened("classic", runtime="torch", precision="fp32")
    text = "Naïve 東京 🙂 fox"
    (document,) = backend.tokenize([text])
    assert document.offsets is not None
    assert document.offsets.shape == (len(document.ids), 2)
    assert set().union(*(range(start, end) for start, end in document.offsets)) == set(range(len(text)))


def test_a_prompt_stays_before_a_query_that_is_cut(opened, models) -> None:
    """It is read with every query, and counts as a part of it."""
    backend = opened("prompted", runtime="torch", precision="fp32")
    plain = opened("modular", runtime="torch", precision="fp32")
    cut = backend.tokenize_query("fox " * 200)
    prompt = plain.tokenize(["search: "])[0].ids[:-1].tolist()
    assert cut.ids[: len(prompt)].tolist() == prompt
    assert cut.cut
    assert raw_scores(backend, QUERY, DOCUMENTS) == pytest.approx(raw_scores(plain, f"search: {QUERY}", DOCUMENTS))


@pytest.mark.parametrize(("name", "at_one"), [("classic", 0.7311), ("identity", 0.7311), ("tanh", 0.8808)])
def test_probabilities_are_the_activations_or_keep_its_order(opened, name: str, at_one: float) -> None:
    """A model whose activation leaves logits as they are, or gives -1 to 1, has probabilities of the same order."""
    backend = opened(name, runtime="torch", precision="fp32")
    values = [backend.to_probability(raw) for raw in (-1e6, -745.0, -1.0, 0.0, 1.0, 745.0, 1e6)]
    assert values == sorted(values)
    assert values[3] == 0.5
    assert values[4] == pytest.approx(at_one, abs=1e-4)
    assert all(0.0 <= value <= 1.0 and not math.isnan(value) for value in values)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_models_token_types_are_given_to_it(opened, runtime: str) -> None:
    """Those of BERT are 0 for the query and 1 for the document; RoBERTa has none."""
    backend = opened("classic", runtime=runtime, precision="fp32")
    (window,) = whole(backend, "fox", ["dog"])
    pair = backend._joined(window)
    assert pair.types == [0] * (2 + len(window.query.ids)) + [1] * (1 + window.end)
    swapped = pair._replace(types=[0] * len(pair.types))
    right, wrong = backend._model.outputs([pair]), backend._model.outputs([swapped])
    assert abs(right - wrong).max() > 1e-3
    assert opened("no types", runtime=runtime, precision="fp32")._joined(window).types is None


def test_the_limit_is_the_smaller_of_the_two(opened) -> None:
    """A model that reads 64 tokens is never given 256; a setting of 32 holds."""
    assert opened("modular", runtime="torch", precision="fp32").info.max_tokens == 64
    small = opened("classic", runtime="torch", precision="fp32", max_tokens=32)
    assert small.info.max_tokens == 32
    assert small.room(small.tokenize_query("fox " * 100)) >= 32 / 3
    assert np.isfinite(raw_scores(small, QUERY * 9, ["dog " * 99])).all()


def test_threads_that_tokenise_at_once_get_what_one_gets(opened) -> None:
    """No state is shared between calls."""
    backend = opened("classic", runtime="torch", precision="fp32")
    texts = [f"{text} {number}" for number, text in enumerate(DOCUMENTS * 4)]
    expected = [document.ids.tolist() for document in backend.tokenize(texts)]

    def tokenised(_: int) -> bool:
        backend.tokenize_query("fox " * 500)
        return [document.ids.tolist() for document in backend.tokenize(texts)] == expected

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(tokenised, range(40)))


# --- runtimes and precisions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_shares_the_fingerprint(opened, precision: str) -> None:
    """Scores stay near fp32's, so that cached ones match; int8 has a fingerprint of its own."""
    exact = opened("classic", runtime="torch", precision="fp32")
    near = opened("classic", runtime="torch", precision=precision)
    windows = whole(exact, QUERY, DOCUMENTS)
    assert near.score(windows) == pytest.approx(exact.score(windows), abs=0.1)
    assert near.score(windows).dtype == np.float32
    assert near.info.fingerprint == exact.info.fingerprint
    assert near.info.precision == precision


def test_int8_is_given_where_it_is_asked_for(opened) -> None:
    """By OpenVINO, with a fingerprint of its own; torch refuses it."""
    rough = opened("classic", precision="int8")
    assert rough.info.fingerprint == opened("classic", precision="fp32", runtime="torch").info.fingerprint + "+int8"
    assert (rough.info.runtime, rough.info.precision) == ("openvino (cpu)", "int8")
    with pytest.raises(InvalidModel, match="int8 needs the openvino runtime"):
        opened("classic", precision="int8", runtime="torch")


def test_scores_are_near_where_they_correlate_and_no_probability_is_far_off() -> None:
    """A constant offset, a lost order and values that are no numbers are each found; of two outputs the difference counts."""
    exact = np.linspace(-3, 3, 20, dtype=np.float32)[:, None]
    assert closeness(exact, exact) == (pytest.approx(1.0), 0.0)
    assert closeness(exact + 0.01, exact).passes
    assert not closeness(exact + 0.2, exact).passes
    assert not closeness(exact[::-1], exact).passes
    assert not closeness(np.where(exact > 2.9, np.nan, exact).astype(np.float32), exact).passes
    pairs = np.concatenate([exact, -exact], axis=1)
    assert closeness(pairs + 5, pairs).passes
    assert not closeness(pairs * [1, 0.5], pairs).passes


def test_constant_scores_agree_though_nothing_correlates() -> None:
    """A model that scores everything alike is as near to itself as any."""
    constant = np.full((5, 1), 0.25, np.float32)
    assert closeness(constant + 1e-5, constant).passes


START = """
import sys
from pathlib import Path
from services.common.encoders import EncoderOptions
from services.rerank.backends.cross_encoder import open_cross_encoder
from services.rerank.ports import Window
options = EncoderOptions(
    cache_dir=Path(sys.argv[2]), runtime="openvino", device="cpu", precision="fp32", threads=1, measure_apart=True
)
backend = open_cross_encoder(sys.argv[1], options, max_tokens=128)
query, (document,) = backend.tokenize_query("a fox"), backend.tokenize(["a dog"])
output = backend.score([Window(query, document, 0, len(document.ids))])
print([name for name in ("torch", "transformers", "openvino") if sys.modules.get(name)], output.tolist())
"""


@pytest.mark.slow
def test_no_start_of_a_service_loads_torch(models, tmp_path: Path) -> None:
    """The first measures in a process of its own, later ones read what it kept; all give the same score."""
    outputs = set()
    for _ in range(2):
        arguments = [sys.executable, "-c", START, str(models["modular"]), str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout.splitlines()[-1])
    (output,) = outputs
    assert output.startswith("['openvino'] [[")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00\xff not json", None])
def test_damaged_files_are_measured_afresh(models, tmp_path: Path, damage: bytes | None) -> None:
    """Whichever kept file is cut, overwritten or gone, the model opens and scores as before."""
    options = EncoderOptions(cache_dir=tmp_path, runtime="openvino", precision="fp32", device="cpu", threads=1)

    def scores() -> list[float]:
        backend = CrossEncoderBackend(str(models["classic"]), options, max_tokens=128)
        try:
            return raw_scores(backend, QUERY, DOCUMENTS)
        finally:
            backend.close()

    expected = scores()
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert {file.relative_to(tmp_path).parts[0] for file in files} == {"choices", "graphs", "tokenizers"}
    for file in files:
        file.unlink() if damage is None else file.write_bytes(damage)
        assert scores() == expected, file
        assert file.is_file()


def test_a_kept_form_that_was_tampered_with_is_made_again(models, tmp_path: Path) -> None:
    """A choice whose description lacks a part counts as damaged."""
    options = EncoderOptions(cache_dir=tmp_path, runtime="torch", precision="fp32", device="cpu", threads=1)
    first = CrossEncoderBackend(str(models["classic"]), options, max_tokens=128)
    (choice,) = (tmp_path / "choices").glob("*.json")
    edit_json(choice, description='{"form": {}}')
    second = CrossEncoderBackend(str(models["classic"]), options, max_tokens=128)
    assert raw_scores(second, QUERY, DOCUMENTS) == raw_scores(first, QUERY, DOCUMENTS)
