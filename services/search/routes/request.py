"""What the routes take from a request besides its body: resources, settings, deadlines."""

from typing import Annotated, Literal

from fastapi import Header, Path, Query, Request

from services.common.app import deadline_of, resources_of, service_of
from services.common.deadline import HEADER, Deadline
from services.common.wire.base import CollectionName
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


def search_deadline(request: Request, timeout_ms: int | None) -> Deadline:
    """Return when the search must be answered: its timeout_ms or the default, and the caller's header, whichever is first."""
    settings = settings_of(request)
    asked_ms = timeout_ms if timeout_ms is not None else settings.default_timeout_ms
    deadline = deadline_of(request) if HEADER in request.headers else Deadline()
    return deadline.at_most(min(asked_ms / 1000, settings.max_timeout_s))


def write_deadline(request: Request) -> Deadline:
    """Return when a write must be acknowledged."""
    return deadline_of(request) if HEADER in request.headers else Deadline.after(settings_of(request).write_timeout_s)
