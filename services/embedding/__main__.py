"""`python -m services.embedding [--model SPEC]…` runs the embedding service."""

import argparse
import os

from services.common.app import run_service
from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="services.embedding", description="Serve embedding models over HTTP.")
    parser.add_argument(
        "--model",
        action="append",
        metavar="SPEC",
        help="[alias=]name[@revision][;key=value]…, as often as there are models; goes before EMBEDDING_MODEL",
    )
    models = parser.parse_args().model
    if models:
        os.environ["EMBEDDING_MODEL"] = ",".join(models)
    run_service("embedding", EmbeddingSettings, create_app)
