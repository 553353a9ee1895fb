"""Writes docs/settings.md from the settings classes: `python -m tests.conventions.settings_doc` (or `make docs`)."""

from pathlib import Path

from services.common.settings import settings_table
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings
from services.search.settings import SearchSettings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
INTRODUCTION = """# Settings

Each service reads its settings from environment variables once, when it starts. A variable with a service's prefix that
names no setting stops the start with a suggestion, so a typing error cannot go unnoticed. `tercet up` passes the
variables on to the services and fills in hosts, ports and addresses.

This page is written by `make docs` from the settings classes; a test compares the two.
"""


def render() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    services = (("Embedding", EmbeddingSettings), ("Rerank", RerankSettings), ("Search", SearchSettings))
    for title, settings_class in services:
        parts.append(f"## {title} service\n\n{settings_table(settings_class)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
