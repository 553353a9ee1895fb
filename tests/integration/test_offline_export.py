"""`tercet export`: the ONNX file computes what torch does, and a Triton repository says what is in the file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from services.common.encoders import EncoderOptions
from services.common.encoders.golden import agreement
from services.common.model_errors import ModelNotFound
from services.embedding.offline.console import OfflineError
from services.embedding.offline.exporting import triton_name
from services.embedding.offline.onnx_export import Source, load_source, write_onnx
from services.embedding.offline.output import MARK, check_free, new_directory
from services.embedding.offline.parity import MIN_COSINE
from services.embedding.offline.triton import check_config, parse_config, preferred_sizes
from tests.tiny_models import HIDDEN, write_bert, write_decoder

MODEL = "all-MiniLM-L6-v2"


def tercet(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tercet.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights."""
    return write_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Triton repository with the packaged model, as the command line writes it."""
    place = tmp_path_factory.mktemp("triton") / "repository"
    done = tercet("export", "--model", MODEL, "--format", "triton", "--out", place, "--max-batch-size", 16)
    assert done.returncode == 0, done.stderr
    assert "cosine" in done.stdout
    assert str(place) in done.stdout
    return place


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_repository_runs_and_gives_the_models_vectors(repository: Path) -> None:
    """Texts through the written tokenizer and the written graph have torch's vectors, padded or not."""
    from transformers import AutoTokenizer

    folder = repository / MODEL
    record = json.loads((folder / MARK).read_text())
    assert record["parity"]["min_cosine"] >= MIN_COSINE
    assert record["parity"]["min_token_cosine"] >= MIN_COSINE
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.model_max_length == record["max_tokens"] == 256
    texts = ["A short question?", "A text that is a good deal longer than the other one, by several words. " * 30]
    fields = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="np"))
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (vectors,) = session.run(["sentence_embedding"], {name: fields[name] for name in record["inputs"]})
    reference = load_source(MODEL, EncoderOptions(device="cpu")).reference
    expected = reference.pooled(reference.tokenize(texts))
    assert agreement(vectors, expected).least > MIN_COSINE


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_configuration_says_what_is_in_the_graph(repository: Path) -> None:
    """config.pbtxt parses as Triton's message; names, types and sizes are the graph's, without the batch."""
    folder = repository / MODEL
    config = parse_config((folder / "config.pbtxt").read_text())
    graph = onnx.load(folder / "1" / config.default_model_filename).graph
    assert (config.name, config.backend, config.max_batch_size) == (MODEL, "onnxruntime", 16)
    assert [item.name for item in config.input] == [value.name for value in graph.input]
    assert [item.name for item in config.output] == [value.name for value in graph.output]
    assert [list(item.dims) for item in config.input] == [[-1], [-1]]
    assert [list(item.dims) for item in config.output] == [[384], [-1, 384]]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert config.parameters["max_tokens"].string_value == "256"
    assert "kind: KIND_CPU" in str(config.instance_group)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_configuration_that_differs_from_the_graph_is_found(repository: Path, tmp_path: Path) -> None:
    """A wrong size, a wrong type or a field that Triton does not have is an error that says so."""
    model_file = repository / MODEL / "1" / "model.onnx"
    text = (repository / MODEL / "config.pbtxt").read_text()
    changed = tmp_path / "config.pbtxt"
    for old, new in (("dims: 384", "dims: 383"), ("TYPE_INT64", "TYPE_INT32"), ("max_batch_size", "maximum_batch")):
        changed.write_text(text.replace(old, new, 1))
        with pytest.raises(OfflineError):
            check_config(changed, model_file)


@pytest.mark.timeout(300)
def test_int8_is_written_with_its_loss(tiny: Path, tmp_path: Path) -> None:
    """The loss is printed and kept, the fingerprint differs, and an export is not written over."""
    arguments = ("--format", "triton", "--precision", "int8", "--device", "cuda", "--out", tmp_path / "models")
    done = tercet("export", "--model", tiny, *arguments)
    assert done.returncode == 0, done.stderr
    assert "int8 is lossy" in done.stdout
    folder = tmp_path / "models" / "tiny-bert-int8"
    record = json.loads((folder / MARK).read_text())
    assert record["fingerprint"].endswith("+onnx-int8")
    assert 0.5 < record["parity"]["min_cosine"] < 1
    assert sorted(file.name for file in (folder / "1").iterdir()) == ["model.onnx"]
    assert "KIND_GPU" in (folder / "config.pbtxt").read_text()
    again = tercet("export", "--model", tiny, *arguments)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.timeout(300)
def test_decoder_with_last_token_pooling_exports(tmp_path: Path) -> None:
    """A causal model's last token is found behind the padding, at every shape."""
    source = load_source(str(write_decoder(tmp_path / "decoder")), EncoderOptions(device="cpu"))
    exported = write_onnx(source, tmp_path, precision="fp32", opset=None)
    assert exported.parity.min_cosine >= MIN_COSINE


@pytest.mark.timeout(300)
def test_pooling_is_part_of_the_graph_and_of_the_fingerprint(tiny: Path, tmp_path: Path) -> None:
    """With CLS pooling the pooled vector is the first token's; the file is not the one with mean pooling."""
    source = load_source(str(tiny), EncoderOptions(device="cpu", pooling="cls", max_tokens=32))
    exported = write_onnx(source, tmp_path, precision="fp32", opset=None)
    assert "/32+cls" in exported.fingerprint
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    ids = np.array([[5, 6, 7]])
    pooled, tokens = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert pooled.shape == (1, HIDDEN)
    assert np.allclose(pooled, tokens[:, 0], atol=1e-5)


@pytest.mark.timeout(300)
def test_a_graph_that_computes_something_else_is_not_written(tiny: Path, tmp_path: Path) -> None:
    """Parity with other weights fails, and nothing is left behind."""
    other = load_source(str(write_bert(tmp_path / "other", seed=7)), EncoderOptions(device="cpu"))
    source = load_source(str(tiny), EncoderOptions(device="cpu"))
    mixed = Source(source.description, source.modules, other.reference)
    out = tmp_path / "out" / "model"
    with pytest.raises(OfflineError, match="does not compute"), new_directory(out, force=False) as made:
        write_onnx(mixed, made, precision="fp32", opset=None)
    assert list(out.parent.iterdir()) == []


def test_force_replaces_exports_only(tmp_path: Path) -> None:
    """A folder with anything else in it is left alone, whatever is asked."""
    target = tmp_path / "out"
    with new_directory(target, force=False) as made:
        (made / MARK).write_text("{}")
    with pytest.raises(OfflineError, match="--force"):
        check_free(target, force=False)
    with new_directory(target, force=True) as made:
        (made / MARK).write_text("[]")
    assert (target / MARK).read_text() == "[]"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (target / MARK).rename(target / "thesis.txt")
    with pytest.raises(OfflineError, match="no export"):
        check_free(target, force=True)


def test_errors_are_one_line(tmp_path: Path) -> None:
    """What cannot be written or is no pooling is said before anything is loaded; the exit status is 1."""
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (("--out", tmp_path / "file"), "exists and is no directory"),
        (("--out", tmp_path), "is no export of this command"),
        (("--out", tmp_path / "out", "--pooling", "wild"), "--pooling is one of"),
        (("--out", tmp_path / "out", "--format", "triton", "--name", "a/b"), "is no name for a model"),
    ):
        done = tercet("export", *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_unknown_model_is_named() -> None:
    """The error says where it was looked for."""
    with pytest.raises(ModelNotFound, match="nowhere is not a directory"):
        load_source("./nowhere", EncoderOptions(device="cpu"))


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    """Without the packages of the extra, the command says how to get them."""
    code = (
        "import sys, runpy; sys.modules['onnxscript'] = None; sys.argv = ['x', 'export', '--out', 'out'];"
        "runpy.run_module('services.embedding.offline', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr == "tercet: exporting needs onnxscript: pip install 'tercet[export]'\n"


def test_names_and_sizes() -> None:
    """A model's folder is named so that a URL can have it; preferred batches end with the largest."""
    assert triton_name("org/My Model+v2", "fp32") == "My-Model-v2"
    assert triton_name("all-MiniLM-L6-v2", "int8") == "all-MiniLM-L6-v2-int8"
    assert preferred_sizes(64) == [8, 16, 32, 64]
    assert preferred_sizes(4) == [4]
    assert preferred_sizes(20) == [8, 16, 20]


def test_help_comes_from_the_command_itself() -> None:
    """`tercet export --help` lists the options; an unknown one is a usage error."""
    done = tercet("export", "--help")
    assert done.returncode == 0
    assert "--max-queue-delay-us" in done.stdout
    assert "tercet export" in done.stdout
    assert tercet("export", "--nonsense").returncode == 2
    assert tercet("fit-pca").returncode == 2
