"""Measuring in a process of its own: `python -m services.common.encoders.apart`, its task on standard input."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

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
    try:
        done = subprocess.run(
            [sys.executable, "-m", "services.common.encoders.apart"],
            input=json.dumps(asked, default=str),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("measuring_apart_failed", error=str(error))
        return False
    if done.returncode:
        log.warning("measuring_apart_failed", error=(done.stderr.strip().splitlines() or ["no message"])[-1][:500])
    return done.returncode == 0


def main() -> None:
    """Do the task on standard input."""
    asked = json.load(sys.stdin)
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
