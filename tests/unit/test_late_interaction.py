"""Late interaction as a scorer: what it computes, what it remembers, and what processes share."""

from collections.abc import Sequence

import numpy as np
import pytest

from services.common.encoders import EncoderOptions
from services.rerank.backends import late_interaction
from services.rerank.backends.late_interaction import LateInteractionBackend
from services.rerank.ports import SharesVectors, Window
from tests.table_encoder import DIM, MAX_TOKENS, VOCABULARY, TableEncoder
from tests.tiny_models import write_bert

QUERY = "red cat and green dog"
TEXTS = ("blue cat", "a dog green as grass", "white bird", "red cat green dog", "fish " * 20)
# What int8 takes from a cosine of these short vectors.
TOLERANCE = 0.01


@pytest.fixture
def encoder() -> TableEncoder:
    """The model."""
    return TableEncoder()


@pytest.fixture
def make(encoder: TableEncoder, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a backend over the model."""
    monkeypatch.setattr(late_interaction, "open_encoder", lambda name, options: encoder)

    def made(**options) -> LateInteractionBackend:
        asked = {"cache_bytes": 1 << 20, "max_tokens": MAX_TOKENS, **options}
        backend = LateInteractionBackend("models/table", EncoderOptions(), **asked)
        encoder.read.clear()
        return backend

    return made


def windows(backend: LateInteractionBackend, query: str, texts: Sequence[str]) -> list[Window]:
    """Return a window for each of *texts*, all of it or as much as fits."""
    tokens = backend.tokenize_query(query)
    room = backend.room(tokens)
    return [Window(tokens, text, 0, min(len(text.ids), room)) for text in backend.tokenize(texts)]


def score(backend: LateInteractionBackend, query: str, texts: Sequence[str]) -> list[float]:
    """Return the raw scores of *texts*, computed as one batch."""
    outputs = backend.score(windows(backend, query, texts))
    assert outputs.shape == (len(texts), 1)
    return [backend.relevance(row) for row in outputs]


def cosines(encoder: TableEncoder, query: str, text: str) -> np.ndarray:
    """Return the greatest cosine of each of the query's words to one of the text's."""

    def unit(words: str) -> np.ndarray:
        vectors = encoder.table[[VOCABULARY.get(word, VOCABULARY["[UNK]"]) for word in words.split()]]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return (unit(query) @ unit(text).T).max(axis=1)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_of_the_greatest_cosines(make, encoder: TableEncoder) -> None:
    """Over the query's tokens, special ones of either side left out."""
    expected = [cosines(encoder, QUERY, text).mean() for text in TEXTS]
    assert score(make(), QUERY, TEXTS) == pytest.approx(expected, abs=TOLERANCE)


def test_scores_are_those_of_a_models_own_hidden_states(tmp_path) -> None:
    """With real modules, through transformers beside it: the mean of greatest cosines between last hidden states."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    place = write_bert(tmp_path / "bert")
    options = EncoderOptions(
        device="cpu", runtime="torch", precision="fp32", cache_dir=tmp_path, threads=torch.get_num_threads()
    )
    backend = LateInteractionBackend(str(place), options, cache_bytes=1 << 20, max_tokens=64)
    plain = tmp_path / "bert-plain"
    model, tokenizer = AutoModel.from_pretrained(plain).eval(), AutoTokenizer.from_pretrained(plain)

    def states(text: str) -> np.ndarray:
        with torch.inference_mode():
            made = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1].numpy()
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    query, texts = "A short question?", ["The quick brown fox", "lazy dog 12", "jumps over and over again it does"]
    expected = [(states(query) @ states(text).T).max(axis=1).mean() for text in texts]
    assert score(backend, query, texts) == pytest.approx(expected, abs=TOLERANCE)
    backend.close()


def test_a_documents_punctuation_is_left_out(make, encoder: TableEncoder) -> None:
    """It matches nothing, not even itself, and is neither kept nor shared; a query's counts, as one of its tokens."""
    backend = make()
    (found,) = score(backend, "red ?", ["blue , cat ?"])
    assert found == pytest.approx(cosines(encoder, "red ?", "blue cat").mean(), abs=TOLERANCE)
    ((_, value),) = backend.fresh()
    assert len(value) == 12 + 2 * (4 + DIM)


def test_a_document_of_punctuation_alone_has_it_counted(make) -> None:
    """There is nothing else to compare."""
    alike, other = score(make(), "?", ["? ?", ","])
    assert alike == pytest.approx(1.0, abs=TOLERANCE)
    assert other < 0.9


def test_a_window_is_scored_by_its_own_tokens(make, encoder: TableEncoder) -> None:
    """Windows of one document differ, and each keeps its own vectors."""
    backend = make()
    query = backend.tokenize_query("red cat")
    (document,) = backend.tokenize(["blue dog red cat white fish"])
    batch = [Window(query, document, start, start + 2) for start in (0, 2, 4)]
    expected = [cosines(encoder, "red cat", text).mean() for text in ("blue dog", "red cat", "white fish")]
    for _ in range(2):
        assert backend.score(batch)[:, 0] == pytest.approx(np.array(expected), abs=TOLERANCE)


def test_company_does_not_matter(make) -> None:
    """A batch may hold several queries and the same pair twice, in any order: each pair scores as it does alone."""
    backend = make()
    queries = (QUERY, "bird", "white fish blue frog")
    batch = [window for query in queries for window in windows(backend, query, TEXTS)]
    shuffled = [*batch[::-1], *batch[:4]]
    alone = [make().score([window])[0, 0] for window in shuffled]
    assert backend.score(shuffled)[:, 0] == pytest.approx(np.array(alone), abs=1e-6)


def test_without_tokens_nothing_is_alike(make, encoder: TableEncoder) -> None:
    """An empty document, an empty query and a text that stands alone have the lowest score; no model runs for them."""
    backend = make()
    query = backend.tokenize_query("")
    assert score(backend, QUERY, ["", " "]) == [-1.0, -1.0]
    assert score(backend, "", ["red"]) == [-1.0]
    assert backend.score([Window(query, None, 0, 0)])[0, 0] == -1.0
    assert backend.to_probability(-1.0) == 0.0
    assert [] not in [ids[1:-1] for ids in encoder.read]


def test_probabilities_keep_the_order(make) -> None:
    """From 0 to 1, whatever rounding makes of a cosine."""
    backend = make()
    finished = [backend.to_probability(raw) for raw in (-1.00001, -1.0, -0.2, 0.0, 0.4, 1.0, 1.00001)]
    assert finished == sorted(finished)
    assert (finished[0], finished[-1]) == (0.0, 1.0)


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_documents_are_tokenised_whole(make) -> None:
    """Uncut, without special tokens, with the characters that each token covers; equal texts have equal keys."""
    backend = make()
    long = "fish " * 500
    first, second, empty = backend.tokenize(["red  cat", long, ""])
    assert first.ids.tolist() == [VOCABULARY["red"], VOCABULARY["cat"]]
    assert first.offsets is not None
    assert first.offsets.tolist() == [[0, 3], [5, 8]]
    assert len(second.ids) == 500
    assert empty.ids.shape == (0,)
    assert len({first.key, second.key, empty.key}) == 3
    assert backend.tokenize(["red  cat"])[0].key == first.key


def test_a_long_query_is_cut_to_half_and_says_so(make) -> None:
    """A document's room is the same beside any query: it is read by itself."""
    backend = make()
    short, long = backend.tokenize_query("red cat"), backend.tokenize_query("dog " * 5000)
    assert (short.cut, len(short.ids)) == (False, 2)
    assert (long.cut, len(long.ids)) == (True, MAX_TOKENS // 2 - 2)
    assert backend.room(short) == backend.room(long) == MAX_TOKENS - 2
    assert not backend.tokenize_query("dog " * (MAX_TOKENS // 2 - 2)).cut


def test_usage_counts_special_tokens(make) -> None:
    """A pair counts both texts as the model reads them."""
    backend = make()
    (window,) = windows(backend, "red cat", ["blue dog bird"])
    assert backend.tokens(window) == 4 + 5
    assert backend.tokens(Window(window.query, None, 0, 0)) == 4


def test_the_model_is_made_ready_when_it_is_loaded(encoder: TableEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime prepares itself at the first text: no caller waits for that."""
    monkeypatch.setattr(late_interaction, "open_encoder", lambda name, options: encoder)
    LateInteractionBackend("table", EncoderOptions(), cache_bytes=0, max_tokens=MAX_TOKENS)
    assert encoder.read


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_a_document_is_computed_once(make, encoder: TableEncoder) -> None:
    """The second time it costs next to nothing, counts as much in usage, scores the same, and no model runs."""
    backend = make()
    batch = windows(backend, QUERY, TEXTS)
    costs = [backend.cost_tokens(window) for window in batch]
    assert costs == [len(window.document.ids) + 2 for window in batch]
    tokens = [backend.tokens(window) for window in batch]
    first = backend.score(batch)
    computed = len(encoder.read)
    assert computed == 1 + len(TEXTS)
    assert [backend.cost_tokens(window) for window in batch] == [1] * len(batch)
    assert [backend.tokens(window) for window in batch] == tokens
    assert (backend.score(batch) == first).all()
    assert len(encoder.read) == computed


def test_a_new_query_costs_itself_alone(make, encoder: TableEncoder) -> None:
    """Known documents are scored against another query with one text computed."""
    backend = make()
    score(backend, QUERY, TEXTS)
    encoder.read.clear()
    score(backend, "bird dog", TEXTS)
    assert [len(ids) for ids in encoder.read] == [4]


def test_what_was_forgotten_meanwhile_is_computed_again(make) -> None:
    """With no room to keep anything scores are the same."""
    assert score(make(cache_bytes=0), QUERY, TEXTS) == score(make(), QUERY, TEXTS)
    backend = make(cache_bytes=0)
    assert score(backend, QUERY, TEXTS) == score(backend, QUERY, TEXTS)


def test_a_batch_that_has_grown_is_computed_in_runs(
    make, encoder: TableEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run has more tokens, padding included, than the bound; a single text always runs."""
    expected = score(make(), QUERY, TEXTS)
    for most in (1, 10, 25, 60):
        monkeypatch.setattr(late_interaction, "MOST_RUN_TOKENS", most)
        encoder.read.clear()
        assert score(make(), QUERY, TEXTS) == expected
        assert len(encoder.read) == 1 + len(TEXTS)


def test_numbers_that_are_not_finite_are_not_kept(make, encoder: TableEncoder) -> None:
    """A document that the model fails on has a score that is not a number, others have theirs; later it is well again."""
    backend = make()
    bird = VOCABULARY["bird"]
    healthy = encoder.table[bird].copy()
    encoder.table[bird] = np.nan
    scores = score(backend, "red cat", ["white bird", "red dog"])
    assert np.isnan(scores).tolist() == [True, False]
    assert np.isnan(score(backend, "bird", ["red dog"])).all()
    encoder.table[bird] = healthy
    assert score(backend, "red cat", ["white bird"]) == pytest.approx(
        [cosines(encoder, "red cat", "white bird").mean()], abs=TOLERANCE
    )
    assert score(backend, "bird", ["red dog"]) == pytest.approx(
        [cosines(encoder, "bird", "red dog").mean()], abs=TOLERANCE
    )
    assert len(backend.fresh()) == 2


# --- what processes share -------------------------------------------------------------------------------------------


def share(giver: LateInteractionBackend, taker: LateInteractionBackend) -> int:
    """Give all that is fresh; return how many."""
    fresh = giver.fresh()
    for key, value in fresh:
        taker.take(key, value)
    return len(fresh)


def test_another_process_need_not_compute(make, encoder: TableEncoder) -> None:
    """What one made the other takes, and scores exactly the same without a run for documents."""
    one, other = make(), make()
    assert isinstance(one, SharesVectors)
    expected = score(one, QUERY, TEXTS)
    batch = windows(other, QUERY, [*TEXTS, *TEXTS, ""])
    lacking = other.lacking(batch)
    assert len(lacking) == len(TEXTS)
    assert share(one, other) == len(TEXTS)
    assert other.lacking(batch) == []
    encoder.read.clear()
    assert score(other, QUERY, TEXTS) == expected
    assert len(encoder.read) == 1


def test_only_what_was_made_here_is_offered_and_once(make) -> None:
    """Neither what others made, nor what was offered before."""
    one, other = make(), make()
    score(one, QUERY, TEXTS)
    assert sorted(key for key, _ in one.fresh()) == sorted(one.lacking([]) or other.lacking(windows(one, QUERY, TEXTS)))
    assert one.fresh() == []
    score(one, QUERY, ["frog"])
    assert share(one, other) == 1
    assert other.fresh() == []


def test_what_waits_to_be_offered_is_bounded(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody takes it the oldest go."""
    monkeypatch.setattr(late_interaction, "FRESH_BYTES", 5 * (600 + 2 * (DIM + 4)))
    backend = make()
    texts = [f"w{number} fish" for number in range(40)]
    for text in texts:
        score(backend, QUERY, [text])
    fresh = backend.fresh()
    assert len(fresh) == 5
    assert fresh[-1][0] == make().lacking(windows(backend, QUERY, texts))[-1]


def test_what_cannot_be_read_is_ignored(make, encoder: TableEncoder) -> None:
    """Damaged values, keys of nobody and of other models change nothing."""
    one, other = make(), make()
    score(one, QUERY, ["red frog"])
    ((key, value),) = one.fresh()
    for bad_key, bad_value in (
        (key, value[:-1]),
        (key, b""),
        (key, b"X" + value[1:]),
        (b"", value),
        (key[:18], value),
        (b"X" + key[1:], value),
    ):
        other.take(bad_key, bad_value)
    assert other.lacking(windows(other, QUERY, ["red frog"])) == [key]
    other.take(key, value)
    assert other.lacking(windows(other, QUERY, ["red frog"])) == []


def test_models_do_not_take_each_others(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, or another number of dimensions, has other keys for the same text."""
    backends = [make(), make(dimensions=8), make(dimensions=9)]
    monkeypatch.setattr(late_interaction, "open_encoder", lambda name, options: TableEncoder(seed=8))
    backends.append(LateInteractionBackend("other", EncoderOptions(), cache_bytes=1 << 20, max_tokens=MAX_TOKENS))
    keys = {backend.lacking(windows(backend, QUERY, ["red frog"]))[0] for backend in backends}
    assert len(keys) == len({backend.info.fingerprint for backend in backends}) == len(backends)
    score(backends[0], QUERY, ["red frog"])
    for other in backends[1:]:
        share(backends[0], other)
        assert len(other.lacking(windows(other, QUERY, ["red frog"]))) == 1


# --- dimensions -----------------------------------------------------------------------------------------------------


def test_fewer_dimensions_take_less(make) -> None:
    """Vectors shrink, scores stay near, and the description says so."""
    whole, fewer = make(), make(dimensions=DIM - 4)
    expected = score(whole, QUERY, TEXTS)
    assert score(fewer, QUERY, TEXTS) == pytest.approx(expected, abs=0.2)
    assert sum(len(value) for _, value in fewer.fresh()) < sum(len(value) for _, value in whole.fresh())
    assert f"{DIM - 4} of {DIM} dimensions" in fewer.info.score
    assert "dimensions" not in whole.info.score


@pytest.mark.parametrize("dimensions", [0, DIM, DIM + 1])
def test_all_dimensions_are_no_projection(make, dimensions: int) -> None:
    """Asked for none, for all or for more than there are, all are kept as they are."""
    assert make(dimensions=dimensions).info.fingerprint == make().info.fingerprint


def test_it_says_what_it_is(make) -> None:
    """Name, kind, what a score is made of, and the limit that is the lesser of the model's and the asked one."""
    info = make(max_tokens=1000).info
    assert (info.name, info.kind, info.max_tokens) == ("late-interaction/table", "late-interaction", MAX_TOKENS)
    assert make(max_tokens=16).info.max_tokens == 16
    assert make(max_tokens=16).info.fingerprint != info.fingerprint
    assert info.ranks
    assert info.labels == ()
