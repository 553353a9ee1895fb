"""Causal models that say yes or no: their scores are sentence-transformers', and Qwen3-Reranker's own recipe's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.common.encoders import EncoderOptions
from services.common.errors import InvalidInput
from services.common.model_errors import InvalidModel
from services.rerank.backends.cross_encoder import open_cross_encoder
from services.rerank.backends.decoder import DecoderBackend
from services.rerank.ports import Backend, Window
from tests.tiny_pair_models import PLAIN_CHAT, edit_json, library_scores, write_causal

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAIRS = [
    ("What does the fox do?", "The quick brown fox jumps over the lazy dog."),
    ("one", ""),
    ("ends with a newline\n", "  spaces first"),
    ("A short question? Yes: 12,345.67 €!", "東京\n\nand more, with a colon:"),
    ("", "The quick brown fox. " * 5),
]
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by what is particular to them."""
    place = tmp_path_factory.mktemp("models")
    return {
        "causal": write_causal(place / "causal"),
        "tied": write_causal(place / "tied", tied=True),
        "saved": write_causal(place / "saved", instruction="Find the animal"),
        "first published": write_causal(place / "first", chat=PLAIN_CHAT),
        "no chat": write_causal(place / "none", chat=None),
    }


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory):
    """Return a function that opens a tiny model."""
    cache_dir = tmp_path_factory.mktemp("cache")

    def of(name: str, runtime: str = "torch", *, max_tokens: int = 512) -> Backend:
        options = EncoderOptions(cache_dir=cache_dir, runtime=runtime, precision="fp32", device="cpu", threads=1)
        return DecoderBackend(str(models[name]), options, max_tokens=max_tokens)

    return of


def scores(backend: Backend, pairs) -> list[float]:
    """Return the raw scores of *pairs*, computed as one batch."""
    windows = [
        Window(backend.tokenize_query(query), document, 0, len(document.ids))
        for query, text in pairs
        for document in backend.tokenize([text])
    ]
    return [backend.relevance(output) for output in backend.score(windows)]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["causal", "tied", "saved", "no chat"])
def test_scores_are_those_of_sentence_transformers(opened, models, name: str, runtime: str) -> None:
    """Whatever stands at the joints of template and texts; with an instruction of the model's own where it has one."""
    backend = opened(name, runtime)
    ours = scores(backend, PAIRS)
    theirs = library_scores(models[name], PAIRS, activation_fn=torch.nn.Identity())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert np.ptp(ours) > 0.01
    finished = [backend.to_probability(raw) for raw in ours]
    assert finished == pytest.approx(library_scores(models[name], PAIRS), abs=1e-4)
    assert (backend.info.kind, backend.info.labels, backend.info.ranks) == ("decoder", (), True)


def test_qwen_rerankers_as_first_published_are_asked_in_their_cards_words(opened, models) -> None:
    """Their chat template has no place for a document; the logits after the card's text, yes less no, are the score."""
    tokenizer = AutoTokenizer.from_pretrained(models["first published"])
    model = AutoModelForCausalLM.from_pretrained(models["first published"]).eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    expected = []
    for query, document in PAIRS:
        text = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    assert scores(opened("first published"), PAIRS) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_score_does_not_depend_on_its_company(opened, runtime: str) -> None:
    """Padding stands where no token sees it."""
    backend = opened("causal", runtime)
    together = scores(backend, PAIRS)
    assert scores(backend, PAIRS[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert [scores(backend, [pair])[0] for pair in PAIRS] == pytest.approx(together, abs=1e-5)


def test_a_long_query_is_cut_and_the_template_stays_whole(opened, models) -> None:
    """What asks for yes or no stands after every window, and a query ends as the template has it."""
    backend = opened("causal", max_tokens=256)
    query = backend.tokenize_query("fox " * 400)
    assert query.cut
    (document,) = backend.tokenize(["The lazy dog. " * 100])
    room = backend.room(query)
    assert room >= 256 / 3
    window = Window(query, document, 40, 40 + room)
    assert backend.tokens(window) == 256
    tokenizer = AutoTokenizer.from_pretrained(models["causal"])
    text = tokenizer.decode(backend._joined(window).tokens.ids)
    assert text.startswith("<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n<Query>: fox fox")
    assert "fox\n<Document>:" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_offsets_are_the_documents_not_the_templates(opened) -> None:
    """White space of the template that was tokenised with a document is not counted."""
    backend = opened("causal")
    text = "quick fox, 東京"
    (document,) = backend.tokenize([text])
    assert document.offsets is not None
    covered = [text[start:end] for start, end in document.offsets]
    assert covered[0] == "quick"[: len(covered[0])]
    assert document.offsets.min() == 0
    assert document.offsets.max() == len(text)


def test_only_two_words_of_the_vocabulary_are_kept(opened) -> None:
    """The head of an untied model, often a quarter of it, is not in memory."""
    causal, tied = (opened(name)._model.description.weights_bytes for name in ("causal", "tied"))
    assert causal == tied


def test_a_text_alone_is_refused(opened) -> None:
    """The template asks about a pair."""
    backend = opened("causal")
    window = Window(backend.tokenize_query("fox"), None, 0, 0)
    with pytest.raises(InvalidInput, match="second text"):
        backend.tokens(window)


def test_too_few_tokens_for_the_template_are_told(opened) -> None:
    """Where the model's own words leave no room for a query, the limit is named."""
    with pytest.raises(InvalidModel, match=r"max_tokens 64 is too little"):
        opened("first published", max_tokens=64)


def test_a_chat_model_of_another_family_is_refused(tmp_path: Path) -> None:
    """A template without query and document would show the model neither."""
    directory = write_causal(tmp_path / "model", chat=PLAIN_CHAT)
    edit_json(directory / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    options = EncoderOptions(cache_dir=tmp_path / "cache", runtime="torch", precision="fp32", device="cpu")
    with pytest.raises(InvalidModel, match="chat template has no query and document"):
        open_cross_encoder(str(directory), options, max_tokens=128)


def test_another_chat_template_is_another_model(opened) -> None:
    """Of equal weights: what was kept and cached for one is not taken for the other."""
    one, other = opened("causal"), opened("no chat")
    assert one.info.fingerprint != other.info.fingerprint
    assert scores(one, PAIRS) != pytest.approx(scores(other, PAIRS), abs=1e-2)


def test_the_head_decides_the_class(models, tmp_path: Path) -> None:
    """A causal model's name is enough."""
    options = EncoderOptions(cache_dir=tmp_path, runtime="torch", precision="fp32", device="cpu", threads=1)
    assert isinstance(open_cross_encoder(str(models["causal"]), options, max_tokens=128), DecoderBackend)
