"""
`python -m services.common.health_check FILE` asks the service of this container whether it is ready: exit status 0 or 1.

*FILE* is where the service wrote the port that it listens on (`…_PORT_FILE`), so the check is right whatever the role and
port are. Standard library only: it runs every few seconds beside the service.
"""

import http.client
import sys
from pathlib import Path

TIMEOUT_S = 2.0


def problem(port_file: Path, *, host: str = "127.0.0.1", timeout_s: float = TIMEOUT_S) -> str | None:
    """Return why the service that wrote *port_file* is not ready, or None if it is. Never raises for a service's trouble."""
    try:
        port = int(port_file.read_text())
    except (OSError, ValueError) as error:
        return f"no port is in {port_file} yet: {error}"
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return f"port {port}: {error!r}"
    finally:
        connection.close()
    return None if response.status == http.client.OK else f"{response.status} {body}"


def main(arguments: list[str]) -> int:
    """Print the problem, if any, and return the exit status."""
    found = problem(Path(arguments[0]))
    if found is not None:
        sys.stdout.write(f"{found}\n")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
