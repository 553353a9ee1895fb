"""
What stands in for the container images: the same programs, found by the PATH of a pod, on the pod's own address.

`python` is the one that runs this, with the code of this repository; `redis-server` and PostgreSQL are those of the tests.
"""

import os
import pwd
import shutil
import signal
import sys
from pathlib import Path

from tests.deploy.manifests import ROOT
from tests.postgres_server import PACKAGE, copied, postgres_binaries
from tests.redis_server import redis_executable

# What the entrypoint of the image `postgres` does; unlike there it listens on one address, and on no other socket.
_POSTGRES_ENTRYPOINT = """#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  mkdir -p "$PGDATA"
  printf %s "$POSTGRES_PASSWORD" > "$TMPDIR/password"
  initdb -D "$PGDATA" -U "$POSTGRES_USER" -A scram-sha-256 --pwfile="$TMPDIR/password" -E UTF8 --locale=C --no-sync
  echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D "$PGDATA" postgres
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
fi
exec "$@" -c listen_addresses="$POD_ADDRESS" -c unix_socket_directories=
"""
_REDIS_SERVER = '#!/bin/sh\nexec "{redis}/redis-server" "$@" --bind "$POD_ADDRESS"\n'
_REDIS_CLI = '#!/bin/sh\nexec "{redis}/redis-cli" -h "$POD_ADDRESS" "$@"\n'
_PYTHON = '#!/bin/sh\nexec "{python}" "$@"\n'


def _programs() -> tuple[Path, Path]:
    """Return the directories of PostgreSQL's and of Redis's programs. Raises FileNotFoundError."""
    postgres, redis = postgres_binaries(), redis_executable()
    if postgres is None or redis is None or not Path(redis).with_name("redis-cli").exists():
        raise FileNotFoundError("PostgreSQL, redis-server or redis-cli is missing; the extra `test` brings them")
    return postgres, Path(redis).parent


def trouble() -> str | None:
    """Return which programs are missing here; None where all are there."""
    try:
        _programs()
    except FileNotFoundError as error:
        return str(error)
    return None


class Images:
    """The programs for all pods, under *place*. Raises FileNotFoundError where PostgreSQL or Redis is missing."""

    def __init__(self, place: Path) -> None:
        postgres, redis = _programs()
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user and PACKAGE in postgres.parts:
            postgres = copied(postgres, place)
        programs = place / "bin"
        programs.mkdir()
        scripts = {
            "docker-entrypoint.sh": _POSTGRES_ENTRYPOINT,
            "redis-server": _REDIS_SERVER.format(redis=redis),
            "redis-cli": _REDIS_CLI.format(redis=redis),
            "python": _PYTHON.format(python=sys.executable),
        }
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environ = {
            "PATH": f"{programs}:{postgres}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def user(self, image: str) -> str | None:
        """Return whom an image's processes run as: PostgreSQL refuses to run as root."""
        return self._user if image.startswith("postgres:") else None

    def own(self, directory: Path, image: str) -> None:
        """Give a volume to whom the image's processes run as."""
        user = self.user(image)
        if user:
            entry = pwd.getpwnam(user)
            shutil.chown(directory, entry.pw_uid, entry.pw_gid)

    @staticmethod
    def stop_signal(image: str) -> signal.Signals:
        """Return what a container is stopped with: the image `postgres` declares SIGINT, the others nothing."""
        return signal.SIGINT if image.startswith("postgres:") else signal.SIGTERM
