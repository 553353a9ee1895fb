"""`python -m tests.rerank_service` runs the rerank service with a scorer that has troubles."""

from functools import partial

from services.common.app import run_service
from services.rerank.app import create_app
from services.rerank.settings import RerankSettings
from tests.rerank_backends import TroubledScorer

if __name__ == "__main__":
    run_service("rerank", RerankSettings, partial(create_app, load=lambda _settings: [TroubledScorer()]))
