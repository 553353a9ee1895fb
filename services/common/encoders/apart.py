"""Measuring in a process of its own: the side of the process that asks for it. measuring.py is the other."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from typing import IO, Literal

import structlog

from services.common.encoders.protocol import EncoderOptions

log = structlog.get_logger(__name__)

PATIENCE_S = 240.0
Task = Literal["texts", "pairs"]

_MEASURING = "services.common.encoders.measuring"  # By its name: it imports all that imports this.


def measured_apart(task: Task, name: str, options: EncoderOptions) -> bool:
    """
    Open the model *name* in a child process, which keeps what it chooses in the cache; whether that went well.

    *task* says as what: an encoder of texts, or a scorer of pairs.

    What goes wrong there is logged, and is to be tried here: the error is then raised where it is looked for.
    """
    asked = {"task": task, "name": name, "options": asdict(replace(options, measure_apart=False))}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        try:
            status = _run(json.dumps(asked, default=str), told)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("measuring_apart_failed", error=str(error))
            return False
        if status:
            told.seek(0)
            lines = told.read().strip().splitlines()
            log.warning("measuring_apart_failed", error=(lines or ["no message"])[-1][:500])
    return status == 0


def _run(task: str, told: IO[str]) -> int:
    """Return the child's exit status. Its standard input stays open while this process lives: its end is the child's."""
    command = [sys.executable, "-m", _MEASURING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, text=True) as child:
        try:
            assert child.stdin is not None
            child.stdin.write(task + "\n")
            child.stdin.flush()
            return child.wait(PATIENCE_S)
        except BaseException:
            child.kill()
            raise
