"""What several checks of the manifests need."""

import pytest

from tests.deploy.manifests import OVERLAYS, Overlay, load


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    """Each overlay as it is committed."""
    return load(request.param)
