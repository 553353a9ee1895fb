"""The process that measures: `python -m services.common.encoders.measuring`, its task on standard input (see apart.py)."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from services.common.encoders.protocol import EncoderOptions

_PATHS = ("cache_dir", "projection")


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


def _end_with_the_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # Nobody waits for what this would find out, and both cores are busy with it.


if __name__ == "__main__":
    main()
