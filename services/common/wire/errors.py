"""The one error envelope that every service answers with; OpenAI clients read it too."""

from services.common.wire.base import ReplyModel


class ErrorBody(ReplyModel):
    """What went wrong: a stable *code*, a *message* that says how to mend it, and the field at fault in *param*."""

    code: str
    message: str
    type: str
    param: str | None = None
    retryable: bool = False
    request_id: str | None = None


class ErrorEnvelope(ReplyModel):
    """`{"error": {…}}`."""

    error: ErrorBody
