"""Models of several kinds, opened by name: what they give, what is kept for later starts, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from services.common.encoders import Encoder, EncoderOptions, Projection, fingerprint_of, open_encoder
from services.common.model_errors import InvalidModel, ModelNotFound
from services.common.model_files import DEFAULT_MODEL, files_digest
from tests.tiny_models import HIDDEN, POSITIONS, write_bert, write_decoder
from tests.trouble_service import until

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXTS = ["The quick brown fox.", "one", "A short question? 東京 Москва", "jumps over the lazy dog " * 3, "word " * 100]
NARROW = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by what is particular to them."""
    place = tmp_path_factory.mktemp("models")
    return {
        "mean": write_bert(place / "mean"),
        "cls": write_bert(place / "cls", "cls", seed=3),
        "decoder": write_decoder(place / "decoder"),
        "plain": write_bert(place / "plain", None),
    }


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    """Where these tests' conversions and choices are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(models, cache_dir):
    """Return a function that opens a tiny model."""

    def of(name: str, **options) -> Encoder:
        asked = {"cache_dir": cache_dir, "threads": 1, "device": "cpu"} | options
        return open_encoder(str(models[name]), EncoderOptions(**asked))

    return of


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each row pair."""
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def vectors(encoder: Encoder) -> np.ndarray:
    """Return the vectors of TEXTS, as one batch of mixed lengths."""
    return encoder.pooled(encoder.tokenize(TEXTS))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("kind", "pooling"), [("mean", "mean"), ("cls", "cls"), ("decoder", "lasttoken"), ("plain", "mean")]
)
def test_every_kind_gives_what_sentence_transformers_gives(
    opened, models, runtime: str, kind: str, pooling: str
) -> None:
    """Pooling is the model's own; padding, which others put on the left of a decoder, changes nothing."""
    encoder = opened(kind, runtime=runtime, precision="fp32")
    expected = SentenceTransformer(str(models[kind]), device="cpu").encode(TEXTS, batch_size=1)
    assert encoder.description.pooling == pooling
    assert cosines(vectors(encoder), expected).min() > 0.99999
    assert (encoder.runtime, encoder.precision) == (runtime, "fp32")


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_token_vectors_have_no_padding(opened, runtime: str) -> None:
    """Each text has one row a token, and batches of both kinds may alternate."""
    encoder = opened("decoder", runtime=runtime, precision="fp32")
    batch = encoder.tokenize(TEXTS)
    before = encoder.pooled(batch)
    rows = encoder.per_token(batch)
    assert [len(row) for row in rows] == [len(item.ids) for item in batch]
    assert rows[0] == pytest.approx(encoder.per_token(batch[:1])[0], abs=1e-5)
    assert np.array_equal(encoder.pooled(batch), before)


def test_the_description_is_the_models(opened) -> None:
    """Sizes, limits and the vocabulary come from the files."""
    encoder = opened("mean", runtime="torch", precision="fp32")
    about = encoder.description
    assert (about.dim, about.token_dim, about.max_tokens, about.pad_id) == (HIDDEN, HIDDEN, 64, 0)
    assert (about.model_type, about.similarity, about.variant) == ("bert", "cosine", "")
    assert about.weights_bytes == encoder.weights_bytes > 4 * about.vocabulary_size * HIDDEN
    assert about.digest == files_digest(about.directory)


def test_pooling_may_be_overridden(opened, models) -> None:
    """A model's vectors are pooled as asked, plain ones too, and the fingerprint says so."""
    own, other = (opened("mean", runtime="torch", precision="fp32", pooling=pooling) for pooling in (None, "cls"))
    assert cosines(vectors(own), vectors(other)).max() < 0.999
    first = [row[0] for row in other.per_token(other.tokenize(TEXTS))]
    assert cosines(vectors(other), np.stack(first)).min() > 0.9999
    assert fingerprint_of(other, "x/mean") == fingerprint_of(own, "x/mean") + "+cls"
    assert other.description.digest != own.description.digest
    last = opened("plain", runtime="torch", precision="fp32", pooling="lasttoken")
    assert last.description.pooling == "lasttoken"


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_projection_is_part_of_the_model(opened, tmp_path: Path, runtime: str) -> None:
    """Vectors are brought to unit length, centred and projected as the file says, and the fingerprint has its size and hash."""
    rng = np.random.default_rng(0)
    projection = Projection(
        rng.normal(size=HIDDEN).astype(np.float32) / 10, rng.normal(size=(NARROW, HIDDEN)).astype(np.float32)
    )
    projection.save(tmp_path / "projection")
    own = vectors(opened("mean", runtime="torch", precision="fp32"))
    encoder = opened("mean", runtime=runtime, precision="fp32", projection=tmp_path / "projection")
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    assert vectors(encoder) == pytest.approx((own - projection.mean) @ projection.components.T, abs=1e-4)
    assert encoder.description.dim == NARROW
    assert fingerprint_of(encoder, "m").endswith(f"/64+{projection.name}")
    assert encoder.description.dimensions == ()


def test_a_projection_that_does_not_fit_is_told(opened, tmp_path: Path) -> None:
    """No file, another file, and one for another model's width are each refused with what is wrong."""
    with pytest.raises(InvalidModel, match="no projection that can be used"):
        opened("mean", projection=tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidModel, match="no projection that can be used"):
        opened("mean", projection=tmp_path / "text")
    Projection(np.zeros(5, np.float32), np.ones((2, 5), np.float32)).save(tmp_path / "narrow")
    with pytest.raises(InvalidModel, match="do not work together"):
        opened("mean", projection=tmp_path / "narrow")


def test_max_tokens_is_the_callers_up_to_what_the_model_has(opened) -> None:
    """More than the model's default is read if there are positions for it; beyond them it is an error."""
    encoder = opened("mean", runtime="torch", precision="fp32", max_tokens=POSITIONS)
    assert len(encoder.tokenize(["word " * 500])[0].ids) == POSITIONS
    assert np.isfinite(vectors(encoder)).all()
    with pytest.raises(InvalidModel, match=f"more than the {POSITIONS} positions"):
        opened("mean", max_tokens=POSITIONS + 1)


def test_int8_is_given_with_its_loss_and_a_fingerprint_of_its_own(opened) -> None:
    """It is never as exact as fp32, and says by how much."""
    exact, rough = opened("mean", runtime="torch", precision="fp32"), opened("mean", precision="int8")
    near = cosines(vectors(exact), vectors(rough))
    assert 0.95 < near.min() < 0.999999
    assert (rough.runtime, rough.precision) == ("openvino", "int8")
    assert set(rough.measured["openvino int8"]) == {"min_cosine", "mean_cosine"}
    assert fingerprint_of(rough, "m") == fingerprint_of(exact, "m") + "+int8"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_through_torch_shares_the_fingerprint(opened, precision: str) -> None:
    """Vectors stay near fp32's, so collections match."""
    exact, near = (opened("decoder", runtime="torch", precision=each) for each in ("fp32", precision))
    assert cosines(vectors(exact), vectors(near)).min() > 0.99
    assert vectors(near).dtype == np.float32
    assert fingerprint_of(exact, "m") == fingerprint_of(near, "m")


# --- later starts ---------------------------------------------------------------------------------------------------

START = """
import sys, json
from pathlib import Path
from services.common.encoders import EncoderOptions, open_encoder
options = EncoderOptions(cache_dir=Path(sys.argv[2]), runtime="openvino", device="cpu", precision="fp32", threads=1)
encoder = open_encoder(sys.argv[1], options)
encoder.per_token(encoder.tokenize(["a text"]))
vectors = encoder.pooled(encoder.tokenize(["a text"])).tolist()
libraries = ("torch", "transformers", "sentence_transformers", "openvino", "openvino_telemetry")
print(json.dumps([[name for name in libraries if sys.modules.get(name)], encoder.reason, vectors]))
"""


def start(model: str, cache_dir: Path):
    """Open *model* in a process of its own."""
    arguments = [sys.executable, "-c", START, model, str(cache_dir)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_kept_choice_starts_without_torch(models, tmp_path: Path) -> None:
    """The first start converts and checks; the second imports OpenVINO alone, and gives the same numbers."""
    loaded, reason, first = start(str(models["mean"]), tmp_path)
    assert loaded == ["torch", "transformers", "sentence_transformers", "openvino"]
    assert start(str(models["mean"]), tmp_path) == [["openvino"], reason, first]


def kept_files(cache_dir: Path) -> list[Path]:
    """Return what is kept, but for directories and locks."""
    return sorted(file for file in cache_dir.rglob("*") if file.is_file() and file.suffix != ".lock")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1, 2]", b"\x00\xff not json", None])
def test_damaged_files_are_measured_afresh(opened, tmp_path: Path, damage: bytes | None) -> None:
    """Whichever kept file is cut, overwritten or gone, the model opens, and the file is whole again afterwards."""
    asked = {"runtime": "openvino", "precision": "fp32", "cache_dir": tmp_path}
    expected = vectors(opened("mean", **asked))
    names = [file.relative_to(tmp_path) for file in kept_files(tmp_path)]
    assert {file.parts[0] for file in names} == {"choices", "graphs", "tokenizers"}
    for name in names:
        if damage is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(damage)
        assert np.array_equal(vectors(opened("mean", **asked)), expected), name
        assert [file.relative_to(tmp_path) for file in kept_files(tmp_path)] == names
        assert np.array_equal(vectors(opened("mean", **asked)), expected), name


def test_a_graph_with_other_weights_is_found_out(opened, tmp_path: Path) -> None:
    """Weights that rotted on disk give other vectors than fp32's kept ones: the graph is made again."""
    asked = {"runtime": "openvino", "precision": "fp32", "cache_dir": tmp_path}
    expected = vectors(opened("mean", **asked))
    (weights,) = tmp_path.rglob("*.bin")
    content = np.frombuffer(weights.read_bytes(), np.uint8).copy()
    np.random.default_rng(0).shuffle(content)
    weights.write_bytes(content.tobytes())
    assert np.array_equal(vectors(opened("mean", **asked)), expected)


def test_a_cache_that_cannot_be_written_harms_nobody(opened, tmp_path: Path) -> None:
    """The model opens and computes, from memory."""
    (tmp_path / "file").write_text("in the way")
    encoder = opened("mean", runtime="openvino", precision="fp32", cache_dir=tmp_path / "file")
    assert np.isfinite(vectors(encoder)).all()


def test_other_files_are_another_model(opened, models, tmp_path: Path) -> None:
    """What was kept for a model is not used for one whose files differ."""
    changed = tmp_path / "changed"
    shutil.copytree(models["mean"], changed)
    shutil.copy(models["cls"] / "model.safetensors", changed / "model.safetensors")
    models["changed"] = changed
    own, other = (opened(name, runtime="openvino", precision="fp32") for name in ("mean", "changed"))
    assert fingerprint_of(own, "m") != fingerprint_of(other, "m")
    assert cosines(vectors(own), vectors(other)).max() < 0.99


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer"),
        ("config.json", "config.json"),
        ("1_Pooling", "1_Pooling"),
        ("1_Pooling/config.json", "config.json"),
    ],
)
def test_a_missing_file_is_named(models, tmp_path: Path, missing: str, named: str) -> None:
    """Before any library trips over it."""
    copy = tmp_path / "model"
    shutil.copytree(models["mean"], copy)
    gone = copy / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(InvalidModel, match=named):
        open_encoder(str(copy), EncoderOptions(cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("file", ["model.safetensors", "modules.json", "config.json", "tokenizer.json"])
def test_a_file_that_is_cut_off_is_told(models, tmp_path: Path, file: str) -> None:
    """A download that broke off names the model, or the file where it is known."""
    copy = tmp_path / "model"
    shutil.copytree(models["mean"], copy)
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModel, match="model"):
        open_encoder(str(copy), EncoderOptions(cache_dir=tmp_path / "cache"))


def test_a_missing_shard_is_named(models, tmp_path: Path) -> None:
    """Weights in several files: the index says which there must be."""
    copy = tmp_path / "model"
    shutil.copytree(models["mean"], copy)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(InvalidModel, match=r"model-00001\.safetensors is missing"):
        open_encoder(str(copy), EncoderOptions(cache_dir=tmp_path / "cache"))


def test_no_model_is_told() -> None:
    """A path without a model is not looked for anywhere else."""
    with pytest.raises(ModelNotFound, match="is not a directory"):
        open_encoder("/no/such/place", EncoderOptions())


@pytest.mark.slow
def test_the_packaged_model_measures_and_says_why(tmp_path: Path) -> None:
    """`auto` names what it chose and beside what, within the bound; asked again it says the same."""
    encoder = open_encoder(DEFAULT_MODEL, EncoderOptions(cache_dir=tmp_path, device="cpu", threads=1))
    chosen = f"{encoder.runtime} {encoder.precision}"
    assert chosen in encoder.reason
    assert encoder.measured[chosen]["min_cosine"] >= 0.999
    assert {"torch fp32", "openvino fp32"} <= set(encoder.measured)
    again = open_encoder(DEFAULT_MODEL, EncoderOptions(cache_dir=tmp_path, device="cpu", threads=1))
    assert (again.reason, again.measured) == (encoder.reason, encoder.measured)


def test_measuring_apart_leaves_no_torch_here(models, tmp_path: Path) -> None:
    """A first start that measures in a child process is as small as a later one, and computes the same."""
    script = f"""
import sys
from pathlib import Path
from services.common.encoders import EncoderOptions, open_encoder
options = EncoderOptions(cache_dir=Path({str(tmp_path)!r}), runtime="openvino", precision="fp32", measure_apart=True)
encoder = open_encoder({str(models["mean"])!r}, options)
assert encoder.pooled(encoder.tokenize(["a text"])).shape[0] == 1
assert "torch" not in sys.modules, "torch was loaded"
print(encoder.reason)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino fp32" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_measuring_apart_ends_with_who_waits_for_it(models, tmp_path: Path) -> None:
    """A service that is killed while it measures leaves nothing behind that keeps the processor busy."""
    script = f"""
from pathlib import Path
from services.common.encoders import EncoderOptions, open_encoder
open_encoder({str(models["mean"])!r}, EncoderOptions(cache_dir=Path({str(tmp_path)!r}), measure_apart=True))
"""
    service = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _child_of(service.pid) is not None)
        child = _child_of(service.pid)
        assert child is not None
    finally:
        service.kill()
        service.wait()
    until(lambda: not _runs(child), within_s=5.0)


def _child_of(parent: int) -> int | None:
    """Return the id of the process that measures for *parent*, if it has begun."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                command = (stat.parent / "cmdline").read_text()
                return int(stat.parent.name) if "services.common.encoders.measuring" in command else None
        except OSError:  # It has ended since.
            continue
    return None


def _runs(process: int) -> bool:
    """Whether there is such a process, one that nobody has waited for aside."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
