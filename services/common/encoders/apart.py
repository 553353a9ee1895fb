"""Measuring in a process of its own: `python -m services.common.encoders.apart`, its task on standard input."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal

import structlog

from services.common.encoders.protocol import EncoderOptions

log = structlog.get_logger(__name__)

PATIENCE_S = 240.0
Task = Literal["texts", "pairs"]
_PATHS = ("cache_dir", "projection")


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
    command = [sys.executable, "-m", "services.common.encoders.apart"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, text=True) as child:
        try:
            assert child.stdin is not None
            child.stdin.write(task + "\n")
            child.stdin.flush()
            return child.wait(PATIENCE_S)
        except BaseException:
            child.kill()
            raise


def _end_with_the_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # Nobody waits for what this would find out, and both cores are busy with it.


def main() -> None:
    """Do the task in the first line of standard input, as long as that is open."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    values: dict[str, Any] = asked["options"]
    values |= {key: Path(values[key]) for key in _PATHS if values[key]}
    options = EncoderOptions(**values)
    if asked["task"] == "pairs":
        from services.common.encoders.pairs.opening import measure_pairs

        measure_pairs(asked["name"], options)
    else:
        from services.common.encoders.opening import measure

        measure(asked["name"], options)


if __name__ == "__main__":
    main()
