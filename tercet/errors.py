"""
What talking to a stack can raise.

    TercetClientError
    ├── TercetApiError      the service answered with an error
    ├── TercetUnreachable   nothing answered
    └── IndexingFailed      a batch of documents could not be written; says which
"""

from collections.abc import Sequence

from services.common.wire.errors import ErrorBody


class TercetClientError(Exception):
    """Base of everything that this client raises; the message can be shown to a person."""


class TercetApiError(TercetClientError):
    """The service's own error: its HTTP *status* and what its envelope says."""

    def __init__(self, status: int, error: ErrorBody, *, retry_after_s: float | None = None) -> None:
        hint = "; give one with --api-key or TERCET_API_KEY" if status == 401 else ""
        details = [f"HTTP {status}"] + ([f"request {error.request_id}"] if error.request_id else [])
        super().__init__(f"{error.message} ({', '.join(details)}){hint}")
        self.status = status
        self.code = error.code
        self.message = error.message
        self.param = error.param
        self.request_id = error.request_id
        self.retryable = error.retryable
        self.retry_after_s = retry_after_s


class TercetUnreachable(TercetClientError):
    """There was no answer from *url*; *refused* says that nothing listens there."""

    def __init__(self, url: str, reason: str, *, refused: bool) -> None:
        hint = "; start it with `tercet up`, or name another with --url" if refused else ""
        super().__init__(f"no answer from {url}: {reason}{hint}")
        self.url = url
        self.refused = refused


class IndexingFailed(TercetClientError):
    """A batch was not written, from document *first_id* to *last_id*; *ids* are those known to be at fault, if any."""

    def __init__(self, first_id: str, last_id: str, ids: Sequence[str], error: TercetClientError) -> None:
        known = ", ".join(repr(id_) for id_ in ids)
        where = f"document {known} was refused" if known else f"documents {first_id!r} to {last_id!r} were not written"
        super().__init__(f"{where}: {error}")
        self.first_id = first_id
        self.last_id = last_id
        self.ids = tuple(ids)
        self.error = error
