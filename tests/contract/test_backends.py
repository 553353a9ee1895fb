"""The backends that ship, each held to its contract, and the models' own numbers compared with sentence-transformers'."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from services.common.encoders import EncoderOptions
from services.common.encoders.hardware import processor
from services.common.errors import InvalidInput
from services.common.model_files import DEFAULT_MODEL, InvalidModel, ModelNotFound, files_digest, resolve_model
from services.embedding.backends.fake import FakeBackend as FakeEmbedding
from services.embedding.backends.transformer import TransformerBackend
from services.embedding.models import load_backend as load_embedding
from services.embedding.ports import Backend as EmbeddingBackend
from services.embedding.settings import EmbeddingSettings
from services.rerank.backends.cross_encoder import CrossEncoderBackend
from services.rerank.backends.fake import FakeBackend as FakeScorer
from services.rerank.backends.late_interaction import LateInteractionBackend, TokenVectorCache
from services.rerank.models import load_backend as load_scorer
from services.rerank.ports import Backend as RerankBackend
from services.rerank.ports import Pair
from services.rerank.settings import RerankSettings
from tests.contract.embedding_backend_contract import TEXTS, EmbeddingBackendContract
from tests.contract.mixed_texts import mixed_texts
from tests.contract.rerank_backend_contract import DOCUMENTS, QUERY, RerankBackendContract

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share two cores with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- embedding ------------------------------------------------------------------------------------------------------


class TestFakeEmbedding(EmbeddingBackendContract):
    """The model without weights."""

    @pytest.fixture
    def backend(self) -> EmbeddingBackend:
        return FakeEmbedding()

    def test_texts_that_share_words_are_near(self, backend: EmbeddingBackend) -> None:
        """The more words two texts share the nearer they are, so that a stack on fakes ranks sensibly."""
        query, near, far = self.embed(backend, ["red green blue", "the blue and the green", "tax return deadline"])
        assert query @ near > query @ far + 0.2


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where converted models and choices of this run are kept."""
    return tmp_path_factory.mktemp("model-cache")


def exactly(runtime: str, precision: str, threads: int, cache_dir: Path) -> EncoderOptions:
    """Return options that leave nothing to measurement."""
    return EncoderOptions(runtime=runtime, precision=precision, device="cpu", threads=threads, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def opened(cache_dir: Path) -> Callable[[str, str, int], TransformerBackend]:
    """Return a function that gives the packaged model by runtime, precision and threads, opened once each."""
    return cache(lambda *asked: TransformerBackend(DEFAULT_MODEL, exactly(*asked, cache_dir)))


@pytest.fixture(scope="session")
def transformer(opened: Callable[[str, str, int], TransformerBackend]) -> TransformerBackend:
    """The packaged model through torch at fp32."""
    return opened("torch", "fp32", 1)


@pytest.fixture(scope="session")
def reference() -> SentenceTransformer:
    """The same files, loaded as sentence-transformers' users load them."""
    return SentenceTransformer(str(resolve_model(DEFAULT_MODEL)), device="cpu", local_files_only=True)


@pytest.mark.slow
class TestTransformer(EmbeddingBackendContract):
    """The packaged model through torch at fp32."""

    @pytest.fixture
    def backend(self, transformer: TransformerBackend) -> EmbeddingBackend:
        return transformer

    def test_it_gives_what_sentence_transformers_gives(
        self, backend: EmbeddingBackend, reference: SentenceTransformer
    ) -> None:
        """At fp32 every vector has a cosine of at least 0.9999 to sentence-transformers' own."""
        texts = [*TEXTS, "", "[SEP]", "e" * 5000, "word " * 2000]
        ours = self.embed(backend, texts)
        theirs = reference.encode(texts, convert_to_numpy=True, normalize_embeddings=True)
        cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1)
        assert cosines.min() >= 0.9999

    def test_token_counts_are_the_tokenizers(self, backend: EmbeddingBackend, reference: SentenceTransformer) -> None:
        """Usage counts what the model's tokenizer makes of a text, special tokens included."""
        counts = [len(tokens.ids) for tokens in backend.tokenize(TEXTS)]
        assert counts == [len(reference.tokenizer(text)["input_ids"]) for text in TEXTS]

    def test_it_may_be_tokenised_with_from_any_thread(self, backend: EmbeddingBackend) -> None:
        """Eight threads that tokenise at once get what one gets."""
        expected = [tokens.ids for tokens in backend.tokenize(TEXTS)]
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _: [tokens.ids for tokens in backend.tokenize(TEXTS)], range(64)))
        assert all(result == expected for result in results)

    def test_its_fingerprint_is_the_files(self, backend: EmbeddingBackend) -> None:
        """The same files give the same fingerprint, under whatever path or name they were loaded."""
        digest = files_digest(resolve_model(f"sentence-transformers/{DEFAULT_MODEL}"))
        assert backend.info.fingerprint == f"{DEFAULT_MODEL}@{digest[:16]}/{backend.info.max_tokens}"


class FasterTransformer(EmbeddingBackendContract):
    """The packaged model by another runtime or at a lower precision; a subclass names them."""

    runtime: str
    precision: str
    threads = 1

    @pytest.fixture
    def backend(self, opened: Callable[[str, str, int], EmbeddingBackend]) -> EmbeddingBackend:
        return opened(self.runtime, self.precision, self.threads)

    def test_it_stays_near_sentence_transformers(
        self, backend: EmbeddingBackend, reference: SentenceTransformer
    ) -> None:
        """Every vector of 60 texts of many lengths and scripts has a cosine of at least 0.999 to theirs at fp32."""
        texts = mixed_texts(60)
        ours = self.embed(backend, texts)
        theirs = reference.encode(texts, convert_to_numpy=True, normalize_embeddings=True)
        assert ((ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1)).min() >= 0.999

    def test_it_is_the_same_model(self, backend: EmbeddingBackend, transformer: TransformerBackend) -> None:
        """fp32, bf16 and either runtime serve one collection: the fingerprint is one."""
        assert backend.info.fingerprint == transformer.info.fingerprint
        assert backend.info.runtime == f"{self.runtime} (cpu)"
        assert backend.info.precision == self.precision


@pytest.mark.slow
class TestTorchBf16(FasterTransformer):
    """Weights as bf16."""

    tolerance = 1e-2
    runtime, precision = "torch", "bf16"


@pytest.mark.slow
class TestOpenvinoFp32(FasterTransformer):
    """The graph runtime, exact."""

    runtime, precision = "openvino", "fp32"


@pytest.mark.slow
class TestOpenvinoFp32InParts(FasterTransformer):
    """The graph runtime with three threads: batches are cut into parts, single texts are one thread's work or all threads'."""

    runtime, precision, threads = "openvino", "fp32", 3


@pytest.mark.slow
@pytest.mark.skipif(not processor().has_bf16, reason="this processor computes no bf16")
class TestOpenvinoBf16(FasterTransformer):
    """The graph runtime, as most CPUs of a server will run it."""

    tolerance = 1e-2
    runtime, precision = "openvino", "bf16"


# --- scorers --------------------------------------------------------------------------------------------------------


class TestFakeScorer(RerankBackendContract):
    """The scorer without weights."""

    any_query_fits = True

    @pytest.fixture
    def scorer(self) -> RerankBackend:
        return FakeScorer()

    def test_a_score_is_the_share_of_the_querys_words(self, scorer: RerankBackend) -> None:
        """Two of four words found is one half."""
        assert self.score(scorer, "red green blue white", ["Blue, and RED.", "black"]) == [0.5, 0.0]


@pytest.fixture(scope="session")
def late_interaction(cache_dir: Path) -> LateInteractionBackend:
    """MaxSim over the packaged model at fp32."""
    options = exactly("torch", "fp32", 1, cache_dir)
    return LateInteractionBackend(DEFAULT_MODEL, options, cache_bytes=1 << 24, max_tokens=128)


def max_sim(model: SentenceTransformer, query: str, text: str, max_tokens: int) -> float:
    """Return the mean over query tokens of the greatest cosine to a document token, in plain NumPy."""

    def token_vectors(content: str) -> np.ndarray:
        ids = model.tokenizer(content, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.inference_mode():
            states = model[0].auto_model(**ids).last_hidden_state[0].numpy()
        states = states[1:-1]  # Without [CLS] and [SEP].
        return states / np.linalg.norm(states, axis=1, keepdims=True)

    cosines = token_vectors(query) @ token_vectors(text).T
    return float(cosines.max(axis=1).mean())


@pytest.mark.slow
class TestLateInteraction(RerankBackendContract):
    """MaxSim over the packaged model's token vectors."""

    tolerance = 2e-3  # Token vectors are kept as float16.

    @pytest.fixture
    def scorer(self, late_interaction: LateInteractionBackend) -> RerankBackend:
        return late_interaction

    def test_it_is_max_sim(self, scorer: RerankBackend, reference: SentenceTransformer) -> None:
        """Scores are those of a plain NumPy MaxSim, to what float16 keeps."""
        expected = [max_sim(reference, QUERY, text, scorer.info.max_tokens) for text in DOCUMENTS]
        assert self.score(scorer, QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-3)

    def test_it_ranks(self, scorer: RerankBackend) -> None:
        """The document that answers the question is above one that does not."""
        answer, other = self.score(scorer, QUERY, DOCUMENTS[:2])
        assert answer > other + 0.1

    def test_a_document_seen_before_costs_next_to_nothing(self, scorer: RerankBackend) -> None:
        """The second time a document costs one token in a batch, counts as much in usage, and scores the same."""
        text = "A document that no other test scores, of some length, so that its cost shows."
        (first,) = scorer.prepare([Pair(QUERY, text)])
        (score,) = scorer.score([first])
        (second,) = scorer.prepare([Pair(QUERY, text)])
        assert (second.cost_tokens, second.tokens) == (1, first.tokens)
        assert first.cost_tokens > 10
        assert scorer.score([second])[0] == pytest.approx(score, abs=1e-3)

    def test_a_document_without_words_scores_lowest(self, scorer: RerankBackend) -> None:
        """An empty document matches nothing."""
        assert self.score(scorer, QUERY, [""]) == [-1.0]
        assert scorer.to_probability(-1.0) == 0.0

    def test_a_long_query_is_refused_whatever_was_seen_before(self, scorer: RerankBackend) -> None:
        """A text that was scored as a document, cut, still is too long as a query."""
        text = "sunlight and energy " * 200
        self.score(scorer, QUERY, [text])
        with pytest.raises(InvalidInput):
            scorer.prepare([Pair(text, "a document")])


def test_token_vectors_are_bounded_by_bytes() -> None:
    """The least recently used go first, and what is larger than the bound is not kept."""
    vectors = np.zeros((10, 8), dtype=np.float16)
    cache = TokenVectorCache(3 * vectors.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.put(key, vectors)
    assert cache.get(b"a") is not None
    cache.put(b"d", vectors)
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key) is not None] == [b"a", b"c", b"d"]
    cache.put(b"large", np.zeros((100, 8), dtype=np.float16))
    assert cache.get(b"large") is None


@pytest.fixture(scope="session")
def make_cross_encoder_files(tmp_path_factory: pytest.TempPathFactory):
    """Write tiny cross-encoders with random weights and the packaged tokenizer."""

    def make(labels: int) -> Path:
        directory = tmp_path_factory.mktemp(f"cross-encoder-{labels}")
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
        torch.manual_seed(7)
        config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.3, **TINY)
        BertForSequenceClassification(config).save_pretrained(directory)
        tokenizer.model_max_length = TINY["max_position_embeddings"]
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def cross_encoder_files(make_cross_encoder_files) -> Path:
    """The files of a tiny cross-encoder with one label."""
    return make_cross_encoder_files(1)


def load_cross_encoder(name: Path, *, max_tokens: int = 256) -> CrossEncoderBackend:
    """Return the cross-encoder in *name* on this processor."""
    return CrossEncoderBackend(str(name), revision=None, precision="auto", device="cpu", max_tokens=max_tokens)


@pytest.fixture(scope="session")
def cross_encoder(cross_encoder_files: Path) -> CrossEncoderBackend:
    """The tiny cross-encoder."""
    return load_cross_encoder(cross_encoder_files)


class TestCrossEncoder(RerankBackendContract):
    """A cross-encoder with random weights."""

    @pytest.fixture
    def scorer(self, cross_encoder: CrossEncoderBackend) -> RerankBackend:
        return cross_encoder

    def test_it_gives_what_sentence_transformers_gives(self, scorer: RerankBackend, cross_encoder_files: Path) -> None:
        """Raw scores are CrossEncoder's logits, finished ones its default predictions."""
        theirs = CrossEncoder(str(cross_encoder_files), device="cpu", local_files_only=True)
        pairs = [(QUERY, text) for text in DOCUMENTS]
        logits = theirs.predict(pairs, activation_fn=torch.nn.Identity())
        ours = self.score(scorer, QUERY, DOCUMENTS)
        assert np.ptp(logits) > 0.01
        assert ours == pytest.approx(logits.tolist(), abs=1e-4)
        finished = [scorer.to_probability(score) for score in ours]
        assert finished == pytest.approx(theirs.predict(pairs).tolist(), abs=1e-4)

    def test_a_long_query_is_kept_whole(self, scorer: RerankBackend, cross_encoder_files: Path) -> None:
        """However long the document is, it alone is cut: every token of the query is read."""
        query = "light " * 100
        (pair,) = scorer.prepare([Pair(query, "plants and energy " * 200)])
        whole = AutoTokenizer.from_pretrained(cross_encoder_files)(query)["input_ids"]
        assert pair.payload["input_ids"][: len(whole)] == whole
        assert pair.tokens == scorer.info.max_tokens

    def test_the_sigmoid_never_overflows(self, scorer: RerankBackend) -> None:
        """Logits of any size give probabilities."""
        finished = [scorer.to_probability(raw) for raw in (-1e6, -745.0, 0.0, 745.0, 1e6)]
        assert finished == pytest.approx([0, 0, 0.5, 1, 1])
        assert not any(math.isnan(score) for score in finished)

    def test_the_limit_is_the_smaller_of_the_two(self, scorer: RerankBackend, cross_encoder_files: Path) -> None:
        """A model that reads 128 tokens is never given 256; a setting of 64 holds."""
        assert scorer.info.max_tokens == 128
        assert load_cross_encoder(cross_encoder_files, max_tokens=64).info.max_tokens == 64

    def test_it_may_be_prepared_from_any_thread(self, scorer: RerankBackend) -> None:
        """Threads that prepare pairs at once get what one gets."""
        pairs = [Pair(QUERY, text) for text in DOCUMENTS]
        expected = [pair.payload["input_ids"] for pair in scorer.prepare(pairs)]
        barrier = threading.Barrier(4)

        def prepare(_: int) -> bool:
            barrier.wait(10)
            return all([pair.payload["input_ids"] for pair in scorer.prepare(pairs)] == expected for _ in range(25))

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(prepare, range(4)))

    def test_the_tokenizer_that_threads_share_is_always_told_the_same(
        self, scorer: CrossEncoderBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """How it truncates is state of the tokenizer: a setting for queries would cut another thread's documents."""
        told = set()
        tell = scorer._tokenizer.set_truncation_and_padding

        def listen(padding_strategy, truncation_strategy, max_length, *args, **more):
            told.add((padding_strategy, truncation_strategy, max_length))
            return tell(padding_strategy, truncation_strategy, max_length, *args, **more)

        monkeypatch.setattr(scorer._tokenizer, "set_truncation_and_padding", listen)
        scorer.prepare([Pair(QUERY, text) for text in DOCUMENTS])
        with pytest.raises(InvalidInput):
            scorer.prepare([Pair("sunlight " * 500, "text")])
        assert len(told) == 1


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_that_cannot_score_is_refused(make_cross_encoder_files, labels: int) -> None:
    """A classifier with several labels is no cross-encoder for us, and the message says how many it has."""
    with pytest.raises(ModelNotFound, match=f"{labels} labels"):
        load_cross_encoder(make_cross_encoder_files(labels))


def test_a_cross_encoder_has_no_int8(cross_encoder_files: Path) -> None:
    """What it cannot compute is told before the model is loaded."""
    with pytest.raises(InvalidModel, match="int8"):
        CrossEncoderBackend(str(cross_encoder_files), revision=None, precision="int8", device="cpu", max_tokens=64)


# --- names to backends ----------------------------------------------------------------------------------------------


def test_fake_needs_no_files() -> None:
    """The model `fake` is there in both services."""
    assert isinstance(load_embedding(EmbeddingSettings(model="fake")), FakeEmbedding)
    assert isinstance(load_scorer(RerankSettings(model="fake")), FakeScorer)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "~/nowhere"])
def test_a_path_without_a_model_is_told(name: str) -> None:
    """A path that is no directory is named, and no hub is asked."""
    with pytest.raises(ModelNotFound, match="is not a directory"):
        load_embedding(EmbeddingSettings(model=name))
    with pytest.raises(ModelNotFound, match="is not a directory"):
        load_scorer(RerankSettings(model=name))


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    """A directory that holds something else is named with what is missing."""
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor modules\.json"):
        resolve_model(str(tmp_path))


def test_the_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    """A changed weight or setting changes the digest; a README does not."""
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = files_digest(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    assert files_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightS")
    assert files_digest(tmp_path) != before


def test_infos_are_frozen() -> None:
    """What a backend says of itself cannot be changed under it."""
    info = FakeEmbedding().info
    with pytest.raises(AttributeError):
        info.dim = 3
    assert replace(info, dim=3).dim == 3
