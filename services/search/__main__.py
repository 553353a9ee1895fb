"""
`python -m services.search` runs the search service; with `--role shard` or `--role fallback`, a node that hosts shards.
"""

import argparse
import os

from services.common.app import run_service
from services.search.app import create_app
from services.search.settings import SearchSettings


def main() -> None:
    """Run what the command line, else SEARCH_ROLE, says."""
    parser = argparse.ArgumentParser(prog="python -m services.search", description=__doc__)
    parser.add_argument("--role", choices=("all", "router", "shard", "fallback"), help="instead of SEARCH_ROLE")
    role = parser.parse_args().role
    if role is not None:
        os.environ["SEARCH_ROLE"] = role
    run_service("search", SearchSettings, create_app)


if __name__ == "__main__":
    main()
