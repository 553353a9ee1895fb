"""What the routes take from a request besides its body: resources, settings, deadlines."""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, get_args

from fastapi import Header, Path, Query, Request
from starlette.types import Scope

from services.common.app import deadline_of, resources_of, service_of
from services.common.deadline import HEADER, NO_DEADLINE, Deadline
from services.common.errors import InvalidInput
from services.common.headers import header
from services.common.wire.base import CollectionName
from services.common.wire.search import Priority
from services.search.resources import SearchResources
from services.search.settings import SearchSettings

Name = Annotated[CollectionName, Path(description="The collection's name.")]
Wait = Annotated[
    Literal["applied", "acknowledged"],
    Query(description="`applied`: reply once searches see it; `acknowledged`: once it is on disk."),
]

IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A write that is repeated under the same key is not done again: its reply is that of the first.",
    ),
]

PRIORITY_HEADER: Final = "x-priority"
SEARCH_HEADERS: Final[dict[str, Any]] = {  # For OpenAPI: a route that declared them would not be served directly.
    "parameters": [
        {
            "name": "X-Priority",
            "in": "header",
            "description": "How urgent this is where there is too much to do: `low` is turned away first, `high` last. "
            "A search is `normal` unless it says, and many at once are `low`.",
            "schema": {"type": "string", "enum": list(get_args(Priority))},
        },
        {
            "name": "X-Deadline-Ms",
            "in": "header",
            "description": "The milliseconds that the caller still waits; `timeout_ms` counts if it is less.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        },
    ]
}
# The paths of searches, and how urgent those are that do not say.
_SEARCHES: Final[dict[str, Priority]] = {"/search": "normal", "/search/batch": "low", "/msearch": "low"}
_PRIORITIES: Final[dict[bytes, Priority]] = {one.encode(): one for one in get_args(Priority)}


def resources(request: Request) -> SearchResources:
    """Return the search service's resources."""
    found = resources_of(request)
    assert isinstance(found, SearchResources)
    return found


def settings_of(request: Request) -> SearchSettings:
    """Return the search service's settings."""
    settings = service_of(request).settings
    assert isinstance(settings, SearchSettings)
    return settings


def search_deadlines(request: Request) -> Callable[[int | None], Deadline]:
    """
    Return what says, for a search's timeout_ms or None, when it must be answered.

    That is so long (without one, the default) after it was asked, and never after what the caller's header said.
    """
    settings = settings_of(request)
    whole = deadline_of(request) if header(request.scope, HEADER.encode()) is not None else NO_DEADLINE

    def due(timeout_ms: int | None) -> Deadline:
        asked_ms = timeout_ms if timeout_ms is not None else settings.default_timeout_ms
        return whole.at_most(min(asked_ms / 1000, settings.max_timeout_s))

    return due


def write_deadline(request: Request) -> Deadline:
    """Return when a write must be acknowledged."""
    return deadline_of(request) if HEADER in request.headers else Deadline.after(settings_of(request).write_timeout_s)


def priority_of(request: Request) -> Priority:
    """Return how urgent *request* is: what its X-Priority says, or what its path implies. Raises InvalidInput."""
    said = header(request.scope, PRIORITY_HEADER.encode())
    if said is None:
        return _SEARCHES.get(request.scope["path"], "normal")
    if said not in _PRIORITIES:
        raise InvalidInput("X-Priority: must be high, normal or low", param=PRIORITY_HEADER)
    return _PRIORITIES[said]


def door(scope: Scope) -> Callable[[], None] | None:
    """Count a search in, and return what counts it out. Raises Overloaded, which turns it away unread."""
    usual = _SEARCHES.get(scope["path"])
    found = scope["app"].state.service.resources
    if usual is None or found is None:
        return None
    assert isinstance(found, SearchResources)
    said = header(scope, PRIORITY_HEADER.encode())
    return found.admission.visit(_PRIORITIES.get(said, usual) if said is not None else usual)
