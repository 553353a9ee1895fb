"""How the search service's routes are reached."""

import pytest

from services.common.direct_routes import DirectRoutes
from services.search import routes


@pytest.mark.parametrize("path", ["/search", "/search/batch"])
def test_searches_take_the_short_way(path: str) -> None:
    """What is asked most is served without the framework's routing: a cached answer costs less than that does."""
    direct = DirectRoutes(lambda *_: None, [route for router in routes.routers for route in router.routes])  # type: ignore[arg-type,return-value]
    assert ("POST", path) in direct
