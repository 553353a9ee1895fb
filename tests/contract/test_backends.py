"""The backends that ship, each held to its contract, and the models' own numbers compared with sentence-transformers'."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from services.common.encoders import EncoderOptions
from services.common.encoders.hardware import processor
from services.common.model_errors import ModelNotFound
from services.common.model_files import DEFAULT_MODEL, files_digest, resolve_model
from services.embedding.backends.fake import FakeBackend as FakeEmbedding
from services.embedding.backends.transformer import TransformerBackend
from services.embedding.models import load_backend as load_embedding
from services.embedding.ports import Backend as EmbeddingBackend
from services.embedding.settings import EmbeddingSettings
from tests.contract.embedding_backend_contract import TEXTS, EmbeddingBackendContract
from tests.contract.mixed_texts import mixed_texts

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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


# --- names to backends ----------------------------------------------------------------------------------------------


def test_fake_needs_no_files() -> None:
    """The model `fake` is there."""
    assert isinstance(load_embedding(EmbeddingSettings(model="fake")), FakeEmbedding)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "~/nowhere"])
def test_a_path_without_a_model_is_told(name: str) -> None:
    """A path that is no directory is named, and no hub is asked."""
    with pytest.raises(ModelNotFound, match="is not a directory"):
        load_embedding(EmbeddingSettings(model=name))


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
