"""`python -m services.search` runs the search service."""

from services.common.app import run_service
from services.search.app import create_app
from services.search.settings import SearchSettings

if __name__ == "__main__":
    run_service("search", SearchSettings, create_app)
