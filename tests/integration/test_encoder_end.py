"""A model's end leaves the process as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_bert

pytestmark = pytest.mark.slow
PROGRAM = """
import gc, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, lambda number, frame: print("handled", flush=True))
from services.common.encoders import EncoderOptions, open_encoder
encoder = open_encoder(sys.argv[1], EncoderOptions(threads=1, runtime="openvino", cache_dir=Path(sys.argv[2])))
encoder.close()
del encoder
gc.collect()
signal.raise_signal(signal.SIGINT)
"""


def test_an_interrupt_after_the_last_graph_was_closed(tmp_path: Path) -> None:
    """It reaches the process's own handler; the runtime's libraries, which had one too, are not unloaded from under it."""
    write_bert(tmp_path / "bert")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "bert"), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["handled"]), ended.stderr
