"""The search page at `/`: one HTML file that asks the public API, with nothing to build and nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, Response

PAGE = Path(__file__).with_name("search.html").read_text()
# Only what is in the page itself may run or be shown; text of documents is never taken as HTML.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; form-action 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    """Return the search page."""
    return Response(PAGE, media_type="text/html; charset=utf-8", headers={"content-security-policy": POLICY})
