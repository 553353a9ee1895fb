"""The scorers that ship, each held to the contract of backends, and which one a model's name gets."""

from collections.abc import Iterator

import pytest

from services.common.encoders import EncoderOptions
from services.common.model_errors import ModelNotFound
from services.common.model_files import DEFAULT_MODEL
from services.rerank.backends.cross_encoder import open_cross_encoder
from services.rerank.backends.fake import FakeBackend
from services.rerank.backends.late_interaction import LateInteractionBackend
from services.rerank.models import load_backends
from services.rerank.ports import Backend
from services.rerank.settings import RerankSettings
from tests.contract.rerank_backend_contract import DOCUMENTS, QUERY, RerankBackendContract, score
from tests.tiny_pair_models import write_classifier


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EncoderOptions:
    """Exactly, on one of the cores that tests share."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return EncoderOptions(device="cpu", runtime="torch", precision="fp32", threads=1, cache_dir=cache_dir)


class TestFakeScorer(RerankBackendContract):
    """The scorer without weights."""

    @pytest.fixture
    def scorer(self) -> Backend:
        return FakeBackend()

    def test_a_score_is_the_share_of_the_querys_words(self, scorer: Backend) -> None:
        """Two of four words found is one half."""
        assert score(scorer, "red green blue white", ["Blue, and RED.", "black"]) == [0.5, 0.0]


@pytest.fixture(scope="module")
def late_interaction(options: EncoderOptions) -> Iterator[Backend]:
    """MaxSim over the packaged model."""
    backend = LateInteractionBackend(DEFAULT_MODEL, options, cache_bytes=1 << 24, max_tokens=128)
    yield backend
    backend.close()


@pytest.mark.slow
class TestLateInteraction(RerankBackendContract):
    """MaxSim over the packaged model's token vectors."""

    tolerance = 5e-3  # Documents' vectors are kept in 8 bits a number.

    @pytest.fixture
    def scorer(self, late_interaction: Backend) -> Backend:
        return late_interaction

    def test_it_ranks(self, scorer: Backend) -> None:
        """The document that answers the question is above one that does not."""
        answer, other = score(scorer, QUERY, DOCUMENTS[:2])
        assert answer > other + 0.1


@pytest.fixture(scope="module")
def cross_encoder(options: EncoderOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A tiny cross-encoder with random weights."""
    directory = write_classifier(tmp_path_factory.mktemp("models") / "one", seed=3)
    backend = open_cross_encoder(str(directory), options, max_tokens=256)
    yield backend
    backend.close()


class TestCrossEncoder(RerankBackendContract):
    """A cross-encoder with one label."""

    @pytest.fixture
    def scorer(self, cross_encoder: Backend) -> Backend:
        return cross_encoder


# --- names to backends ----------------------------------------------------------------------------------------------


def test_fake_needs_no_files() -> None:
    """The model `fake` is there."""
    (backend,) = load_backends(RerankSettings(model="fake"))
    assert isinstance(backend, FakeBackend)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "~/nowhere", "late-interaction/./nowhere"])
def test_a_path_without_a_model_is_told(name: str) -> None:
    """A path that is no directory is named, and no hub is asked."""
    with pytest.raises(ModelNotFound, match="is not a directory"):
        load_backends(RerankSettings(model=name))
