"""`python -m services.rerank` runs the rerank service."""

from services.common.app import run_service
from services.rerank.app import create_app
from services.rerank.settings import RerankSettings

if __name__ == "__main__":
    run_service("rerank", RerankSettings, create_app)
