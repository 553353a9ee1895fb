"""Cross-encoders with several labels, and models whose head cannot score pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from services.common.encoders import EncoderOptions
from services.common.encoders.pairs.form import PairForm, PairTokenizer
from services.common.encoders.pairs.model import PairDescription
from services.common.encoders.pairs.torch_pairs import TorchPairs
from services.common.errors import OutOfMemory
from services.common.model_errors import InvalidModel, ModelNotFound
from services.rerank.backends.cross_encoder import CrossEncoderBackend, open_cross_encoder
from services.rerank.backends.decoder import DecoderBackend
from services.rerank.ports import Backend, QueryTokens, Window
from tests.tiny_models import SHAPE, write_bert
from tests.tiny_pair_models import (
    bert_tokenizer,
    library_scores,
    write_causal,
    write_classifier,
    write_modular,
    write_xlnet,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAIRS = [("What does the fox do?", "It jumps."), ("one", "The lazy dog."), ("A short question?", "12,345.67 €")]
THREE = {"id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by how many labels they have, and of what."""
    place = tmp_path_factory.mktemp("models")
    return {
        "two": write_classifier(place / "two", 2),
        "three": write_classifier(place / "three", 3, **THREE),
        "modular two": write_modular(place / "modular-two", labels=2),
        "modular four": write_modular(place / "modular-four", labels=4),
        "encoder": write_bert(place / "encoder"),
        "plain encoder": write_bert(place / "plain", None),
        "headless": write_modular(place / "headless", head=False),
        "causal": write_causal(place / "causal"),
    }


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> EncoderOptions:
    """How these tests open models."""
    return EncoderOptions(
        cache_dir=tmp_path_factory.mktemp("cache"), runtime="torch", precision="fp32", device="cpu", threads=1
    )


def windows(backend: Backend) -> list[Window]:
    """Return PAIRS as they are scored."""
    return [
        Window(backend.tokenize_query(query), document, 0, len(document.ids))
        for query, text in PAIRS
        for document in backend.tokenize([text])
    ]


@pytest.mark.parametrize("name", ["two", "modular two"])
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_of_two_labels_the_second_against_the_first_ranks(models, options, name: str, runtime: str) -> None:
    """Outputs are the library's; a raw score is the difference of the two logits, its probability their softmax."""
    opened = EncoderOptions(cache_dir=options.cache_dir, runtime=runtime, precision="fp32", device="cpu", threads=1)
    backend = open_cross_encoder(str(models[name]), opened, max_tokens=64)
    outputs = backend.score(windows(backend))
    theirs = np.array(library_scores(models[name], PAIRS, activation_fn=torch.nn.Identity()))
    assert outputs == pytest.approx(theirs, abs=1e-4)
    raw = [backend.relevance(output) for output in outputs]
    assert raw == pytest.approx((theirs[:, 1] - theirs[:, 0]).tolist(), abs=2e-4)
    softmax = library_scores(models[name], PAIRS, activation_fn=torch.nn.Identity(), apply_softmax=True)
    assert [backend.to_probability(one) for one in raw] == pytest.approx([row[1] for row in softmax], abs=1e-4)
    assert (backend.info.kind, backend.info.labels, backend.info.ranks) == ("classifier", ("LABEL_0", "LABEL_1"), True)
    assert "LABEL_1" in backend.info.score


def test_more_labels_are_told_apart_and_rank_nothing(models, options) -> None:
    """Their names are the configuration's, where those are as many as the outputs."""
    three = open_cross_encoder(str(models["three"]), options, max_tokens=64)
    theirs = library_scores(models["three"], PAIRS, activation_fn=torch.nn.Identity())
    assert three.score(windows(three)) == pytest.approx(np.array(theirs), abs=1e-4)
    assert (three.info.labels, three.info.ranks) == (("contradiction", "entailment", "neutral"), False)
    four = open_cross_encoder(str(models["modular four"]), options, max_tokens=64)
    assert four.info.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert four.score(windows(four)).shape == (3, 4)


def test_a_classifier_reads_a_text_alone(models, options) -> None:
    """As transformers gives it: without the token that ends a second text."""
    backend = open_cross_encoder(str(models["three"]), options, max_tokens=64)
    query = backend.tokenize_query("The quick fox")
    window = Window(query, None, 0, 0)
    assert backend.tokens(window) == len(query.ids) + 2
    tokenizer = AutoTokenizer.from_pretrained(models["three"])
    model = AutoModelForSequenceClassification.from_pretrained(models["three"]).eval()
    with torch.inference_mode():
        expected = model(**tokenizer("The quick fox", return_tensors="pt")).logits.numpy()
    assert backend.score([window, *windows(backend)])[:1] == pytest.approx(expected, abs=1e-4)


# --- heads that cannot score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [("encoder", "SentenceTransformer, which makes vectors.*late-interaction/"), ("plain encoder", "it is BertModel")],
)
def test_a_model_without_a_head_is_refused_with_what_works(models, options, name: str, named: str) -> None:
    """Before it is loaded; a library would give it a head of random weights."""
    for kind in (open_cross_encoder, CrossEncoderBackend, DecoderBackend):
        with pytest.raises(ModelNotFound, match=rf"{named}.*sequence-classification.*Qwen3-Reranker.* works"):
            kind(str(models[name]), options, max_tokens=64)


def test_a_masked_language_model_is_refused(tmp_path: Path, options) -> None:
    """What it is, is said."""
    tokenizer = bert_tokenizer()
    AutoModelForMaskedLM.from_config(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"BertForMaskedLM.*works"):
        open_cross_encoder(str(tmp_path), options, max_tokens=64)


def test_modules_that_end_in_no_score_are_refused(models, options) -> None:
    """A CrossEncoder whose modules give a vector has no score."""
    with pytest.raises(InvalidModel, match="no head that scores pairs"):
        open_cross_encoder(str(models["headless"]), options, max_tokens=64)


def test_a_model_that_needs_padding_on_the_left_is_refused(tmp_path: Path, options) -> None:
    """Its scores in a batch would be others than alone."""
    with pytest.raises(InvalidModel, match="padded on the right, pairs get scores that differ"):
        open_cross_encoder(str(write_xlnet(tmp_path / "xlnet")), options, max_tokens=64)


def test_each_class_refuses_the_others_head(models, options) -> None:
    """A causal model has no scores, and a classifier says neither yes nor no."""
    with pytest.raises(ModelNotFound, match=r"causal model.*works"):
        CrossEncoderBackend(str(models["causal"]), options, max_tokens=64)
    with pytest.raises(ModelNotFound, match=r"yes or no.*works"):
        DecoderBackend(str(models["two"]), options, max_tokens=64)


def test_no_model_is_told(options) -> None:
    """A path without a model is not looked for anywhere else."""
    with pytest.raises(ModelNotFound, match="is not a directory"):
        open_cross_encoder("/no/such/place", options, max_tokens=64)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, options, file: str) -> None:
    """A download that broke off names the model, or the file where it is known."""
    write_classifier(tmp_path / "model")
    content = (tmp_path / "model" / file).read_bytes()
    (tmp_path / "model" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModel, match="model"):
        open_cross_encoder(str(tmp_path / "model"), options, max_tokens=64)


# --- memory -----------------------------------------------------------------------------------------------------------


class Narrow(torch.nn.Module):
    """Adds up ids; more than *rows* at once are too much."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids, attention_mask, token_type_ids):
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (input_ids * attention_mask + token_type_ids).sum(dim=1, keepdim=True).float()


def test_a_batch_that_memory_does_not_hold_is_computed_in_halves(models, options) -> None:
    """Down to single pairs, in order; one that is too much by itself is an error."""
    backend = open_cross_encoder(str(models["two"]), options, max_tokens=64)
    about: PairDescription = backend._model.description
    tokenizer: PairTokenizer = backend._model.tokenizer
    assert isinstance(about.form, PairForm)
    query: QueryTokens = backend.tokenize_query("fox")
    batch = [tokenizer.join(query.ids, document.ids) for document in backend.tokenize([text for _, text in PAIRS] * 2)]
    whole, narrow, none = (
        TorchPairs(Narrow(rows), about, tokenizer, device="cpu", precision="fp32") for rows in (99, 1, 0)
    )
    assert narrow.outputs(batch).tolist() == whole.outputs(batch).tolist()
    with pytest.raises(OutOfMemory):
        none.outputs(batch)
