"""
A service that looks names up in a file: `python -m tests.chaos.names FILE services.search`.

The file has a JSON object of names and addresses and is read at every look-up; names that end in `.test` and are not in it
do not resolve, all others do as ever.
"""

import json
import runpy
import socket
import sys
from pathlib import Path
from typing import Any, Final

SUFFIX: Final = ".test"


def name_of(part: str) -> str:
    """Return the name under which a part is looked up."""
    return f"{part.replace(' ', '-')}{SUFFIX}"


def main() -> None:
    """Run the module that the arguments name, with look-ups from the file that they name."""
    names, module = Path(sys.argv[1]), sys.argv[2]
    real = socket.getaddrinfo

    def look_up(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if isinstance(name, str) and name.endswith(SUFFIX):
            host = json.loads(names.read_text()).get(name)
            if host is None:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **options)

    socket.getaddrinfo = look_up
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
