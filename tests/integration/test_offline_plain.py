"""`tercet export --format sentence-transformers`: a whole directory of a packaged model, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from services.common.model_errors import ModelNotFound
from services.common.model_files import resolve_model
from services.embedding.offline.console import OfflineError
from services.embedding.offline.output import MARK
from services.embedding.offline.plain import export_plain
from tests.tiny_models import write_bert


def tercet(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tercet.cli", "export", "--format", "sentence-transformers", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_directory_loads_and_gives_the_models_vectors(tmp_path: Path) -> None:
    """Every file of the model is there, and which model it was; an export is replaced on request only."""
    tiny, out = write_bert(tmp_path / "tiny"), tmp_path / "plain"
    digest = export_plain(str(tiny), out, revision=None, force=False)
    text = ["A short question?"]
    vectors = [SentenceTransformer(str(place), device="cpu").encode(text) for place in (tiny, out)]
    assert np.array_equal(*vectors)
    assert digest in (out / MARK).read_text()
    with pytest.raises(OfflineError, match="--force"):
        export_plain(str(tiny), out, revision=None, force=False)
    assert export_plain(str(tiny), out, revision=None, force=True) == digest


def test_a_damaged_model_is_not_written(tmp_path: Path) -> None:
    """The file that is missing is named."""
    tiny = write_bert(tmp_path / "tiny")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        export_plain(str(tiny), tmp_path / "plain", revision=None, force=False)
    assert not (tmp_path / "plain").exists()


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """It needs none of the packages for ONNX, writes the packaged model, and refuses options that change a graph."""
    done = tercet("--out", tmp_path / "plain")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"written: {tmp_path / 'plain'}" in done.stdout
    files = {file.name for file in resolve_model("all-MiniLM-L6-v2").iterdir()}
    assert {file.name for file in (tmp_path / "plain").iterdir()} == files | {MARK}
    refused = tercet("--out", tmp_path / "other", "--pooling", "cls")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--pooling" in refused.stderr
    assert not (tmp_path / "other").exists()
