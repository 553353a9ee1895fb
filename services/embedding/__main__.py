"""`python -m services.embedding` runs the embedding service."""

from services.common.app import run_service
from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings

if __name__ == "__main__":
    run_service("embedding", EmbeddingSettings, create_app)
