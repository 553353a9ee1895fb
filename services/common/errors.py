"""
The one error tree. It knows no HTTP: services/common/http_errors.py maps each class to a status.

    TercetError
    ├── Malformed              the request cannot be read at all
    ├── Unauthenticated        no API key came with it, or one that is not known
    ├── Forbidden              the API key is known and may not do this
    ├── InvalidInput           it can be read and a field is wrong
    │   ├── EmptyInput             there is nothing to work on: no text, or an empty one
    │   ├── ContextTooLong         a text has more tokens than the model reads, and may not be cut
    │   └── NotTokenizable         the tokenizer cannot take a text, or ids that its vocabulary lacks
    ├── TooLarge               a batch or text is over a limit
    │   └── BodyTooLarge           the body is, whatever it holds
    ├── NotFound               a collection, document, model or route does not exist
    ├── NotAllowed             the route exists and does not take this method
    ├── Conflict               the state of the thing forbids the operation
    ├── Overloaded             a queue is full; try again
    │   └── RateLimited            the caller used up what it is allowed for now
    ├── Unavailable            something needed is not there now
    │   ├── DependencyUnavailable   another service, or Redis
    │   └── NotReady                this service is starting or draining
    ├── DeadlineExceeded       nobody waits for the answer any more
    └── Internal               our fault
        └── BackendFailed      a model or an index raised
            └── OutOfMemory        the device has no room for this work now
"""

from typing import ClassVar


class TercetError(Exception):
    """
    Base of all errors that a caller may see.

    *message* says what is wrong and how to mend it; *param* names the field at fault;
    *retry_after_s* is when a retry may help. *code* is a stable word for programs.
    """

    code: ClassVar[str] = "error"
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class Malformed(TercetError):
    """The request cannot be read: broken JSON, invalid UTF-8, a header that is no number."""

    code = "malformed_request"
    type = "invalid_request_error"


class Unauthenticated(TercetError):
    """An API key is needed: none came, or one that is not known."""

    code = "unauthenticated"
    type = "authentication_error"


class Forbidden(TercetError):
    """The API key is known, and does not have the scope that this needs."""

    code = "forbidden"
    type = "permission_error"


class InvalidInput(TercetError):
    """A field is missing, unknown, of the wrong type or out of its range."""

    code = "invalid_input"
    type = "invalid_request_error"


class EmptyInput(InvalidInput):
    """There is nothing to work on: no text at all, or an empty one."""

    code = "empty_input"


class ContextTooLong(InvalidInput):
    """A text has more tokens than the model reads, and the caller asked that nothing be cut off."""

    code = "context_too_long"


class NotTokenizable(InvalidInput):
    """The tokenizer cannot take a text, or token ids are not in its vocabulary."""

    code = "not_tokenizable"


class TooLarge(TercetError):
    """The batch or a text is over its limit."""

    code = "too_large"
    type = "invalid_request_error"


class BodyTooLarge(TooLarge):
    """The body is over its limit, whatever it holds."""


class NotFound(TercetError):
    """There is no such collection, document, model or route."""

    code = "not_found"
    type = "invalid_request_error"


class NotAllowed(TercetError):
    """The route does not take this method."""

    code = "method_not_allowed"
    type = "invalid_request_error"


class Conflict(TercetError):
    """The state of the thing forbids the operation: the name is taken, the fingerprint differs."""

    code = "conflict"
    type = "invalid_request_error"


class Overloaded(TercetError):
    """A queue is full. Nothing was done; the same request may succeed later."""

    code = "overloaded"
    type = "rate_limit_error"
    retryable = True


class RateLimited(Overloaded):
    """The caller used up its requests or tokens; *retry_after_s* is when it may come again."""

    code = "rate_limited"


class Unavailable(TercetError):
    """Something that the request needs is not there now."""

    code = "unavailable"
    retryable = True


class DependencyUnavailable(Unavailable):
    """Another service or Redis does not answer, or its breaker is open."""

    code = "dependency_unavailable"


class NotReady(Unavailable):
    """This service is starting, draining, or its worker is dead."""

    code = "not_ready"


class DeadlineExceeded(TercetError):
    """The time the caller allowed ran out before the work was done."""

    code = "deadline_exceeded"
    type = "timeout_error"
    retryable = True


class Internal(TercetError):
    """Our fault; the log has the details under the request id."""

    code = "internal_error"


class BackendFailed(Internal):
    """A model or an index raised while it worked on this request."""

    code = "backend_failed"


class OutOfMemory(BackendFailed):
    """The device has no room for this work now, not even in small batches; later it may."""

    code = "out_of_memory"
    retryable = True
